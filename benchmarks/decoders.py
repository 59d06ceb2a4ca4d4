"""Which libraries decode a JPEG and resize its crop fastest, and how far their pixels are from Pillow's: what the plan's choices were picked from.

    OMP_NUM_THREADS=1 python benchmarks/decoders.py --rounds 15

Makes JPEGs (quality 90, 4:2:0) of parts of the photographs that come with scikit-learn and scikit-image, of 500×375 and of 1280×960 pixels. Then, in
one thread and in turn, decodes them and resizes random crops of them to 224 pixels with each candidate. Prints medians over the rounds of the
thread's own ms an image; of decoders in how many images their pixels are Pillow's, of resizers how far they are. Candidates that kdcache does not
offer are tried where they are installed (opencv-python-headless; torchvision, whose decoders are deprecated since 0.29).
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images

from kdcache.draws import draw
from kdcache.images import decode_image
from kdcache.plan import POLICIES, ViewPlan
from kdcache.view_params import Box
from kdcache.views import resize, resize_torch

SIZE = 224
SHAPES = ((500, 375), (1280, 960))
BICUBIC = Image.Resampling.BICUBIC
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def photographs() -> list[Image.Image]:
    folder = os.path.dirname(skimage.data.__file__)
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "motorcycle_left.png")
    opened = [Image.open(os.path.join(folder, name)).convert("RGB") for name in names]
    return opened + [Image.fromarray(photo) for photo in load_sample_images().images]


def make_jpegs(count: int, size_wh: tuple[int, int]) -> list[bytes]:
    random, photos, files = np.random.default_rng(0), photographs(), []
    for i in range(count):
        photo = photos[i % len(photos)]
        width = int(min(photo.width, photo.height * size_wh[0] / size_wh[1]) * random.uniform(0.7, 1))
        height = width * size_wh[1] // size_wh[0]
        left, top = int(random.integers(photo.width - width + 1)), int(random.integers(photo.height - height + 1))
        buffer = io.BytesIO()
        photo.crop((left, top, left + width, top + height)).resize(size_wh, BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def decoders() -> dict[str, Callable[[bytes], Any]]:
    found: dict[str, Callable[[bytes], Any]] = {"pillow": decode_image, "simplejpeg": lambda data: decode_image(data, "simplejpeg")}
    try:
        import cv2

        cv2.setNumThreads(0)
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        found["opencv"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except ImportError:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchvision.io import ImageReadMode, decode_jpeg
    found["torchvision"] = lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB).permute(1, 2, 0).numpy()
    return found


def resizers() -> dict[str, Callable[[Pixels, Box], Any]]:
    def crop(image: Pixels, box: Box) -> Pixels:
        return image[box.top : box.top + box.height, box.left : box.left + box.width]

    def torch_float(image: Pixels, box: Box) -> Pixels:
        x_1CHW = torch.from_numpy(crop(image, box)).permute(2, 0, 1)[None].float()
        resized = F.interpolate(x_1CHW, (SIZE, SIZE), mode="bicubic", antialias=True).round_().clamp_(0, 255)
        view: Pixels = resized.to(torch.uint8)[0].permute(1, 2, 0).numpy()
        return view

    found: dict[str, Callable[[Pixels, Box], Any]] = {
        "pillow": lambda image, box: np.array(resize(crop(image, box), SIZE, BICUBIC)),
        "torch": lambda image, box: resize_torch(crop(image, box), SIZE, BICUBIC),
        "torch, float32": torch_float,
    }
    try:
        import cv2

        for name in ("AREA", "LINEAR", "CUBIC"):
            method = getattr(cv2, f"INTER_{name}")
            found[f"opencv, {name.lower()}"] = lambda image, box, method=method: cv2.resize(crop(image, box), (SIZE, SIZE), interpolation=method)
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    plan = ViewPlan(dataset="bench", policy=POLICIES["weak"], size=SIZE)
    for shape in SHAPES:
        files = make_jpegs(args.images, shape)
        images = [np.asarray(decode_image(data)).copy() for data in files]
        print(
            f"\n{args.images} JPEGs of {shape[0]}x{shape[1]}, {np.mean([len(data) for data in files]) / 1000:.0f} kB on average, {args.rounds} rounds"
        )
        candidates: dict[str, Callable[[int, Box], Any]] = {}
        for name, decode in decoders().items():
            candidates[f"decode: {name}"] = lambda i, _box, decode=decode, files=files: decode(files[i])
        for name, one in resizers().items():
            candidates[f"resize: {name}"] = lambda i, box, one=one, images=images: one(images[i], box)
        times: dict[str, list[float]] = {name: [] for name in candidates}
        far: dict[str, list[Pixels]] = {name: [] for name in candidates}
        for number in range(args.rounds + 1):
            boxes = [draw(plan, "bench", str(i), number, shape).crop for i in range(len(files))]
            for name, work in candidates.items():
                begin = time.thread_time()
                for i, box in enumerate(boxes):
                    work(i, box)
                times[name].append(1e3 * (time.thread_time() - begin) / len(files))
            if number == 0:
                for name, work in candidates.items():
                    stage = name.partition(":")[0]
                    pillows = [np.asarray(candidates[f"{stage}: pillow"](i, box)).astype(np.int16) for i, box in enumerate(boxes)]
                    far[name] = [np.abs(np.asarray(work(i, box)) - pillow) for (i, box), pillow in zip(enumerate(boxes), pillows, strict=True)]
        print(f"{'':>22} {'ms an image':>12}  pixels against Pillow's")
        for name in candidates:
            same, most, mean = (
                sum(not one.any() for one in far[name]),
                max(int(one.max()) for one in far[name]),
                np.mean([one.mean() for one in far[name]]),
            )
            print(
                f"{name:>22} {statistics.median(times[name][1:]):12.3f}  {same} of {len(files)} images the same; at most {most} levels, {mean:.2g} on average"
            )


if __name__ == "__main__":
    main()
