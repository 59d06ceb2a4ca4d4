"""What each encoding keeps and costs: bytes a view, fidelity, and the speed of its way out and back, for two teachers.

    python benchmarks/encodings.py --docs            # about 10 minutes on 2 cores; rewrites the table and the plot of docs/encodings.md
    python benchmarks/encodings.py --json result.json --rounds 9

* digits: the quickstart's teacher, trained here (scikit-learn's digits). Features: `norm`, 8 × 8 tokens, 64 channels; logits: 10 classes.
* ViT-L: `vit_large_patch16_224` with random weights on crops of photographs (scikit-learn, scikit-image), `blocks.22`, and on top, because random
  weights have none: two outlier channels (× 60 and × 100), and four register tokens, eight times as large, with two massive channels.
* synthetic: logits of 1000 classes, normal with a spread of 1.5, the right class raised so that the mean probability of the top class is as labelled.

Statistics come from views that are not the ones measured; `photos` measures ViT-L on photographs of which no crop was seen. Bytes are those of
the shard files that the writer of extract makes. KL of features: the teacher's own head on decoded against original tokens (trained teacher only).
Speeds are on one thread, of float32 values, medians of interleaved rounds: encode and decode are torch's share, write and read
the codec's (Blosc and crc32c); on a GPU the first two are its. Budgets: DESIGN §12. Needs the `bench` extra.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))  # for the teachers; what is timed runs on one

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kdcache.arrays import ArrayReader, ArraySpec, encode_chunk, write_array
from kdcache.encodings import ENCODINGS, Encoding, TargetShape, build_encoding
from kdcache.fidelity import Fidelity
from kdcache.format import TargetIdentity
from kdcache.layout import target_specs
from kdcache.store import open_store
from kdcache.targets import TargetSpec
from kdcache.teacher import load_teacher
from pipelines import quickstart

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / "docs" / "encodings.md"
PLOT = ROOT / "docs" / "encodings.png"
BEGIN, END = "<!-- begin: benchmarks/encodings.py --docs -->", "<!-- end -->"
ARGUMENTS = {"topk": ("1", "10", "50"), "klt": ("0.98", "0.99", "0.995", "0.999")}
"""Of the encodings that take one; every encoding that is registered is measured."""
OUTLIERS = {100: 60.0, 700: 100.0}
MASSIVE = (200, 500)
PIXEL_DIGEST_BYTES = 8
USUAL_ROWS = 1000
"""Of a shard: what a file costs once is shared by them."""


@dataclass
class Case:
    """One target of one teacher: values to calibrate on, values to measure."""

    title: str
    kind: str
    shape: TargetShape
    calibration: dict[str, Tensor]
    measured: dict[str, Tensor]
    labels: Tensor | None = None
    head: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    timed: bool = True


@dataclass
class Row:
    """One line of the table."""

    case: str
    encoding: str
    bytes_per_view: float
    bits_per_value: float
    fidelity: dict[str, float]
    speeds: dict[str, list[float]] = field(default_factory=dict)
    """MB/s of float32 values, one a round."""
    parts: dict[str, float] = field(default_factory=dict)
    """dct: bytes a view of each band."""
    subsets: list[dict[str, Any]] = field(default_factory=list)
    """dct: what a reader of the first bands gets."""


# --- values ----------------------------------------------------------------------------------------------------------


def digits_cases(folder: Path) -> list[Case]:
    """Train the quickstart's teacher and take its targets for views 0 and 1 of the training images."""
    from kdcache.plan import ViewPlan

    quickstart.pack_digits(folder, progress=False)
    top1, _ = quickstart.train_teacher(folder, 0, progress=False)
    teacher = load_teacher(f"local-dir:{folder / 'teacher'}")
    targets = teacher.resolve([TargetSpec(kind="logits"), TargetSpec(kind="features", node="norm")])
    images = quickstart.load_images(folder / "shards" / "train")
    plan = ViewPlan(dataset="digits", policy=quickstart.POLICY, size=quickstart.SIZE)
    values, labels = [], torch.tensor([label for *_, label in images])
    for view in range(2):
        pixels, _ = quickstart.render_all(plan, images, view=view)
        batches = [teacher(batch, list(targets.values())) for batch in pixels.split(256)]
        values.append({name: {part: torch.cat([b[name][part] for b in batches]) for part in batches[0][name]} for name in batches[0]})
    logits, norm = targets.values()

    def head(value: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return teacher.model.forward_head(value["grid"])  # type: ignore[no-any-return,operator]  # no prefix tokens

    title = f"digits, trained ({top1:.1f} % top-1)"
    return [
        Case(f"{title}: norm", "features", norm.shape, {"grid": values[0]["features@norm"]["grid"][:256]}, values[1]["features@norm"], head=head),
        Case(f"{title}: 10 classes", "logits", logits.shape, {}, values[1]["logits"], labels, timed=False),
    ]


def photographs() -> list[np.ndarray[Any, Any]]:
    import skimage.data
    from sklearn.datasets import load_sample_images

    return [*load_sample_images().images, *(getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket", "retina"))]


def crops(photos: Sequence[np.ndarray[Any, Any]], count: int, seed: int) -> Tensor:
    """uint8 (count, 224, 224, 3): random squares, a third of the photograph's side and more."""
    random = np.random.default_rng(seed)
    views = []
    for i in range(count):
        photo = photos[i % len(photos)]
        height, width = photo.shape[:2]
        side = int(random.integers(min(height, width) // 3, min(height, width) + 1))
        top, left = int(random.integers(0, height - side + 1)), int(random.integers(0, width - side + 1))
        views.append(np.asarray(Image.fromarray(photo[top : top + side, left : left + side]).resize((224, 224), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(views))


def vit_l_cases(num_views: int, store: Path | None) -> list[Case]:
    """Two thirds of the crops to calibrate on, the rest to measure; and crops of two photographs that were not among them."""
    if store is not None and store.is_file():
        seen, unseen = torch.load(store, weights_only=True)
    else:
        import timm

        torch.manual_seed(0)
        model = timm.create_model("vit_large_patch16_224", num_classes=0).eval()
        photos = photographs()

        def tokens(pixels: Tensor) -> Tensor:
            with torch.inference_mode():
                x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
                found = [
                    model.forward_intermediates(
                        batch, indices=[22], norm=False, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
                    )[0]
                    for batch in x.split(8)
                ]
            return torch.cat([torch.cat([prefix, grid], dim=1) for grid, prefix in found])

        seen, unseen = tokens(crops(photos[:-2], num_views, 0)), tokens(crops(photos[-2:], num_views // 6, 1))
        if store is not None:
            torch.save((seen, unseen), store)

    def with_outliers(tokens_BNC: Tensor, seed: int) -> dict[str, Tensor]:
        tokens_BNC = tokens_BNC.clone()
        for channel, factor in OUTLIERS.items():
            tokens_BNC[..., channel] *= factor
        cls, grid = tokens_BNC[:, :1], tokens_BNC[:, 1:]
        places = torch.randint(0, grid.shape[1], (len(grid), 4), generator=torch.Generator().manual_seed(seed))
        registers = 8 * grid[torch.arange(len(grid)).unsqueeze(1), places]
        registers[..., MASSIVE] *= 50
        return {"grid": grid, "prefix": torch.cat([cls, registers], dim=1)}

    shape = TargetShape(grid=(14, 14), channels=1024, prefix_tokens=5)
    value = with_outliers(seen, 0)
    count = 2 * len(seen) // 3
    calibration, measured = ({part: tensor[rows] for part, tensor in value.items()} for rows in (slice(count), slice(count, None)))
    title = "ViT-L/16, random init, outliers injected: blocks.22"
    return [
        Case(title, "features", shape, calibration, measured),
        Case(f"{title} (other photos)", "features", shape, calibration, with_outliers(unseen, 1), timed=False),
    ]


def synthetic_cases(rows: int = 1000, classes: int = 1000) -> list[Case]:
    """The right class is raised by bisection until the mean top probability is as stated."""
    cases = []
    for confidence in (0.88, 0.64, 0.21):
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, classes, (rows,), generator=generator)
        base, spread = 1.5 * torch.randn(rows, classes, generator=generator), 2 * torch.randn(rows, generator=generator)

        def raised(height: float, base: Tensor = base, spread: Tensor = spread, labels: Tensor = labels) -> Tensor:
            logits = base.clone()
            logits[torch.arange(len(labels)), labels] += height + spread
            return logits

        low, high = 0.0, 40.0
        for _ in range(30):
            middle = (low + high) / 2
            top = float(raised(middle).softmax(1).amax(1).mean())
            low, high = (middle, high) if top < confidence else (low, middle)
        title = f"synthetic, 1000 classes, mean top probability {confidence}"
        cases.append(Case(title, "logits", TargetShape(num_classes=classes), {}, {"logits": raised(low)}, labels, timed=confidence == 0.64))
    return cases


# --- measuring -------------------------------------------------------------------------------------------------------


_calibrations: dict[tuple[int, str], dict[str, Tensor]] = {}


def encodings_of(case: Case) -> Iterator[Encoding]:
    """Every encoding of the case's kind, calibrated once for all cases that share their calibration views."""
    for name, encoding in ENCODINGS[case.kind].items():
        for argument in ARGUMENTS.get(name, (encoding.example,)) if encoding.argument_name else (None,):
            if name == "topk" and int(argument or 0) > case.shape.num_classes:
                continue
            built = build_encoding(case.kind, name if argument is None else f"{name}={argument}", case.shape)
            calibrator = built.calibrator(case.title)
            key = (id(case.calibration), built.full_name)
            if calibrator is not None:
                if key not in _calibrations:
                    for start in range(0, len(case.calibration["grid"]), 16):
                        calibrator.update({part: tensor[start : start + 16] for part, tensor in case.calibration.items()})
                    _calibrations[key] = calibrator.result()
                built.load_calibration(_calibrations[key])
            yield built


def specs_of(case: Case, encoding: Encoding, rows: int) -> dict[str, ArraySpec]:
    card = TargetIdentity(name=case.kind, kind=case.kind, encoding=encoding.full_name, components=encoding.components())  # type: ignore[arg-type]
    return {name.partition("/")[2]: spec for name, spec in target_specs({case.kind: card}, 1, rows).items()}


def to_numpy(tensor: Tensor, spec: ArraySpec) -> np.ndarray[Any, Any]:
    return tensor.numpy().view(spec.dtype)


def component_bytes(case: Case, encoding: Encoding, components: Mapping[str, Tensor]) -> dict[str, float]:
    """Component → bytes a view: its shard file as extract writes it, and its zarr.json shared by the rows of a usual shard."""
    rows = len(next(iter(components.values())))
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in specs_of(case, encoding, rows).items():
            files = write_array(Path(folder), spec, to_numpy(components[name], spec)[None])
            shard_file = files.pop(spec.shard_path)
            sizes[name] = shard_file.size / rows + sum(file.size for file in files.values()) / max(rows, USUAL_ROWS)
    return sizes


def value_bytes(value: Mapping[str, Tensor]) -> int:
    return sum(4 * tensor.numel() for tensor in value.values())


def measure(case: Case, encoding: Encoding) -> Row:
    value = case.measured
    components = encoding.encode(value, case.labels)
    decoded = encoding.decode(components)
    fidelity = Fidelity(getattr(encoding, "calibration", None), encoding.bands)
    assert fidelity.update(value, decoded)
    figures = fidelity.result()
    if case.head is not None:
        figures |= head_kl(case.head(value), case.head(decoded))
    sizes = component_bytes(case, encoding, components)
    rows = len(next(iter(value.values())))
    row = Row(case.title, encoding.full_name, sum(sizes.values()), 8 * sum(sizes.values()) / (value_bytes(value) / 4 / rows), figures)
    bands = [part for part in encoding.parts() if part in ("dc", "low", "mid", "high")]
    if bands:
        row.parts = {band: sum(sizes[name] for name in encoding.parts()[band]) for band in bands}
        for count in range(1, len(bands) + 1):
            names = encoding.components_of(bands[:count])
            part = encoding.decode({name: components[name] for name in names})
            partial = Fidelity(encoding.calibration)
            partial.update({"grid": value["grid"]}, part)
            kept = sum(figures[f"energy_{band}"] * (1 - figures[f"error_{band}"] ** 2) for band in bands[:count])
            row.subsets.append({"bands": bands[:count], "bytes": sum(sizes[name] for name in names), "energy_kept": kept, **partial.result()})
    return row


def head_kl(original: Tensor, decoded: Tensor) -> dict[str, float]:
    return {
        f"kl_t{t}": float(F.kl_div(*((x.double() / t).log_softmax(1) for x in (decoded, original)), log_target=True, reduction="batchmean"))
        for t in (1, 4)
    }


def time_all(pairs: Sequence[tuple[Case, Encoding, Row]], rounds: int) -> None:
    """Fill in the speeds, round by round over all encodings, so that a busy neighbour meets them all alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepared = []
        for number, (case, encoding, row) in enumerate(pairs):
            count = max(
                8, min(len(next(iter(case.measured.values()))), (8 << 20) // (value_bytes(case.measured) // len(next(iter(case.measured.values())))))
            )
            value = {part: tensor[:count].contiguous() for part, tensor in case.measured.items()}
            labels = case.labels[:count] if case.labels is not None else None
            components = encoding.encode(value, labels)
            specs = specs_of(case, encoding, count)
            readers = {}
            for name, spec in specs.items():
                files = write_array(Path(folder) / str(number), spec, to_numpy(components[name], spec)[None])
                readers[name] = ArrayReader(open_store(folder), str(number), spec, count, shard_size=files[spec.shard_path].size)
            prepared.append((row, encoding, value, labels, components, specs, readers, np.arange(count)))
        for _ in range(rounds):
            for row, encoding, value, labels, components, specs, readers, numbers in prepared:
                actions: dict[str, Callable[[], object]] = {
                    "encode": lambda e=encoding, v=value, y=labels: e.encode(v, y),  # type: ignore[misc]
                    "write": lambda c=components, s=specs: write_chunks(c, s),  # type: ignore[misc]
                    "read": lambda r=readers, n=numbers: [reader.read(0, n) for reader in r.values()],  # type: ignore[misc]
                    "decode": lambda e=encoding, c=components: e.decode(c),  # type: ignore[misc]
                }
                for name, action in actions.items():
                    begin = time.perf_counter()
                    with torch.inference_mode():
                        action()
                    row.speeds.setdefault(name, []).append(value_bytes(value) / 1e6 / (time.perf_counter() - begin))
    torch.set_num_threads(threads)


def write_chunks(components: Mapping[str, Tensor], specs: Mapping[str, ArraySpec]) -> None:
    for name, spec in specs.items():
        rows = to_numpy(components[name], spec)
        for start in range(0, len(rows), spec.chunk_rows):
            encode_chunk(spec, rows[start : start + spec.chunk_rows])


# --- telling ---------------------------------------------------------------------------------------------------------


def budgets(rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """(budget, found, met) of DESIGN §12."""

    def find(case: str, encoding: str) -> Row:
        return next(row for row in rows if row.case.startswith(case) and row.encoding == encoding)

    result = []
    dense = [row for row in rows if row.case.startswith("synthetic") and row.encoding == "dense"]
    worst = {key: max(row.fidelity[key] for row in dense) for key in ("kl_t1", "kl_t4")}
    size = max(row.bytes_per_view for row in dense)
    found = f"{size:.0f} B, KL {worst['kl_t1']:.1e} and {worst['kl_t4']:.1e}"
    result.append(("logits, 1000 classes: dense ≤ 1 kB at KL ≤ 1e-4, T = 1 and 4", found, size <= 1000 and max(worst.values()) <= 1e-4))
    size = max(row.bytes_per_view for row in rows if row.case.startswith("synthetic") and row.encoding == "topk=10") + PIXEL_DIGEST_BYTES
    result.append(("logits, 1000 classes: top-10 with the pixel digest ≤ 40 B", f"{size:.1f} B", size <= 40))
    fitting = [row for row in rows if row.case.startswith("synthetic") and row.bytes_per_view <= 200]
    best = min(max(row.fidelity["kl_t1"], row.fidelity["kl_t4"]) for row in fitting)
    result.append(("stretch: logits ≤ 200 B at KL ≤ 1e-2, T = 1 to 4", f"best KL at 200 B: {best:.2g}", best <= 1e-2))
    for case in ("ViT-L", "digits"):
        row = find(case, "int8")
        small = row.bytes_per_view <= 190_000
        met = small and row.fidelity["z_l2"] <= 0.01
        result.append((f"int8 ≤ 190 kB at z_l2 ≤ .01 ({case})", f"{row.bytes_per_view / 1000:.1f} kB, z_l2 {row.fidelity['z_l2']:.4f}", met))
        row = find(case, "klt=0.99")
        for name, most in (("", 64_000), ("stretch: ", 32_000)):
            met = row.bytes_per_view <= most and row.fidelity["cosine"] >= 0.99
            found = f"{row.bytes_per_view / 1000:.1f} kB, cosine {row.fidelity['cosine']:.4f}"
            result.append((f"{name}klt ≤ {most // 1000} kB at cosine ≥ .99 ({case})", found, met))
    return result


def as_markdown(rows: Sequence[Row], command: str) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}" if 0.001 <= value < 1 else f"{value:.2g}"

    lines = [f"`{command}` on {machine()}.", ""]
    for title in dict.fromkeys(row.case for row in rows):
        mine = [row for row in rows if row.case == title]
        keys = [key for key in ("rel_l2", "cosine", "z_l2", "kl_t1", "kl_t4") if any(key in row.fidelity for row in mine)]
        speeds = [name for name in ("encode", "write", "read", "decode") if any(name in row.speeds for row in mine)]
        names = {"cosine": "cosine", "kl_t1": "KL T=1", "kl_t4": "KL T=4"}
        header = ["encoding", "bytes a view", "bits a value", *(names.get(key, key) for key in keys), *(f"{name} MB/s" for name in speeds)]
        lines += [f"**{title}**", "", "| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
        for row in mine:
            cells = [f"`{row.encoding}`", f"{row.bytes_per_view:,.0f}", f"{row.bits_per_value:.2f}"]
            cells += [f"{row.fidelity[key]:.5f}" if key == "cosine" else number(row.fidelity.get(key)) for key in keys]
            cells += [f"{statistics.median(row.speeds[name]):,.0f}" if name in row.speeds else "" for name in speeds]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        for row in mine:
            if row.parts:
                lines += [
                    f"`{row.encoding}`, by band. Share: of the standardised grid's energy; error: of the band as stored. Then what a reader of the bands so far gets:",
                    "",
                    "| band | bytes a view | share | error | bands read | bytes a view | energy kept | z_l2 | cosine |",
                    "|---|---:|---:|---:|---|---:|---:|---:|---:|",
                ]
                for (band, size), subset in zip(row.parts.items(), row.subsets, strict=True):
                    share, error = row.fidelity[f"energy_{band}"], row.fidelity[f"error_{band}"]
                    read = " + ".join(subset["bands"])
                    lines.append(
                        f"| {band} | {size:,.0f} | {share:.3f} | {error:.4f} | {read} | {subset['bytes']:,.0f} | {subset['energy_kept']:.3f} |"
                        f" {subset['z_l2']:.3f} | {subset['cosine']:.4f} |"
                    )
                lines.append("")
    lines += ["**Budgets**", "", "| budget | found | |", "|---|---|---|"]
    lines += [f"| {budget} | {found} | {'met' if met else '**not met**'} |" for budget, found, met in budgets(rows)]
    return "\n".join(lines)


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        model = next((line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), model)
    run = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"], capture_output=True, text=True)
    return f"{os.cpu_count()} cores ({model}), torch {torch.__version__}, commit `{run.stdout.strip() or 'unknown'}`"


def plot(rows: Sequence[Row], path: Path) -> None:
    """z_l2 against bytes a view, one panel a teacher."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    titles = [title for title in dict.fromkeys(row.case for row in rows if "z_l2" in row.fidelity) if "other photos" not in title]
    figure, axes = plt.subplots(1, len(titles), figsize=(5.6 * len(titles), 4.6), layout="constrained")
    colours = {"fp16": "#7f7f7f", "bf16": "#7f7f7f", "int8": "#1f77b4", "klt": "#d62728", "dct": "#2ca02c"}
    for axis, title in zip(np.atleast_1d(axes), titles, strict=True):
        mine = [row for row in rows if row.case == title]
        klt = sorted((row.bytes_per_view, row.fidelity["z_l2"]) for row in mine if row.encoding.startswith("klt"))
        axis.plot(*zip(*klt, strict=True), color=colours["klt"], linewidth=1, zorder=1)
        for row in mine:
            name = row.encoding.partition("=")[0]
            x, y = row.bytes_per_view, row.fidelity["z_l2"]
            axis.scatter(x, y, color=colours.get(name, "black"), s=36, zorder=2)
            place = {"dct": (7, -11), "klt": (-7, -9)}.get(name, (7, 5))
            axis.annotate(row.encoding, (x, y), textcoords="offset points", xytext=place, ha="right" if place[0] < 0 else "left", fontsize=9)
        for subset in (subset for row in mine for subset in row.subsets[:-1]):
            axis.scatter(subset["bytes"], subset["z_l2"], facecolor="none", edgecolor=colours["dct"], s=36, zorder=2)
            axis.annotate(
                "+".join(subset["bands"]),
                (subset["bytes"], subset["z_l2"]),
                textcoords="offset points",
                xytext=(7, 4),
                fontsize=8,
                color=colours["dct"],
            )
        axis.set(xscale="log", yscale="log", xlabel="bytes a view", ylabel="z_l2: relative error of standardised channels")
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.18, y=0.1)
        axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=96, help="crops through ViT-L, two thirds of them to calibrate on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--docs", action="store_true", help="rewrite the tables in docs/encodings.md and its plot")
    parser.add_argument("--features", type=Path, metavar="FILE", help="keep ViT-L's tokens here, and take them from here if it is there")
    args = parser.parse_args()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the small teacher is fastest on one
    with tempfile.TemporaryDirectory() as folder:
        cases = digits_cases(Path(folder))
    torch.set_num_threads(threads)
    print("digits: done", file=sys.stderr)
    cases += [*vit_l_cases(args.views, args.features), *synthetic_cases()]
    print("ViT-L: done", file=sys.stderr)
    rows: list[Row] = []
    timed: list[tuple[Case, Encoding, Row]] = []
    for case in cases:
        for encoding in encodings_of(case):
            rows.append(measure(case, encoding))
            if case.timed:
                timed.append((case, encoding, rows[-1]))
    time_all(timed, args.rounds)

    text = as_markdown(rows, " ".join(["python benchmarks/encodings.py", *sys.argv[1:]]))
    print(text)
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(), "rows": [vars(row) for row in rows]}, indent=1) + "\n")
    if args.markdown is not None:
        args.markdown.write_text(text + "\n")
    if args.plot is not None:
        plot(rows, args.plot)
    if args.docs:
        page = DOC.read_text()
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        DOC.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
        plot(rows, PLOT)


if __name__ == "__main__":
    main()
