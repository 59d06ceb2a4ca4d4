"""Images: every colour mode has one documented result, every damage one reason, and no bytes raise anything else."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from helpers import image_bytes, make_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdcache.images import UnreadableImageError, decode_image


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_rgb_is_what_pillow_decodes(extension: str) -> None:
    data = image_bytes(make_image(0), extension)
    decoded = pixels(data)
    assert decoded.shape == (30, 40, 3)
    if extension == "png":
        assert np.array_equal(decoded, np.asarray(make_image(0)))
    else:
        assert np.abs(decoded.astype(int) - np.asarray(make_image(0))).mean() < 8


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_grey_is_repeated(extension: str) -> None:
    decoded = pixels(image_bytes(make_image(0, mode="L"), extension))
    assert np.array_equal(decoded[..., 0], decoded[..., 1])
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_one_bit_images_become_black_and_white() -> None:
    assert set(np.unique(pixels(image_bytes(make_image(0, mode="1"), "png")))) == {0, 255}


def test_cmyk_is_converted() -> None:
    decoded = pixels(image_bytes(make_image(0, mode="CMYK"), "jpg", quality=95))
    assert np.abs(decoded.astype(int) - np.asarray(make_image(0))).mean() < 12


def test_alpha_is_dropped() -> None:
    image = make_image(0)
    image.putalpha(make_image(1, mode="L"))
    assert np.array_equal(pixels(image_bytes(image, "png")), np.asarray(make_image(0)))
    grey = make_image(0, mode="L")
    with_alpha = grey.copy().convert("LA")
    assert np.array_equal(pixels(image_bytes(with_alpha, "png"))[..., 0], np.asarray(grey))


@pytest.mark.parametrize("transparency", [3, bytes([0, 128, 255] * 20)])
def test_palettes_are_expanded_with_or_without_transparency(transparency: int | bytes) -> None:
    image = make_image(0).quantize(64)
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels(image_bytes(image, "png")), expected)
    assert np.array_equal(pixels(image_bytes(image, "png", transparency=transparency)), expected)


def test_16_bit_grey_keeps_its_high_byte() -> None:
    values = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    decoded = pixels(image_bytes(Image.fromarray(values), "png"))
    assert np.array_equal(decoded[..., 0], (values >> 8).astype(np.uint8))


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image = make_image(0)
    assert np.array_equal(pixels(image_bytes(image, "jpg", exif=exif)), pixels(image_bytes(image, "jpg")))


def test_damaged_exif_data_is_not_looked_at() -> None:
    image = make_image(0)
    damaged = image_bytes(image, "jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
    assert np.array_equal(pixels(damaged), pixels(image_bytes(image, "jpg")))


@pytest.mark.parametrize("size_wh", [(1, 1), (900, 3), (3, 900)])
@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_extreme_shapes_decode(size_wh: tuple[int, int], extension: str) -> None:
    assert decode_image(image_bytes(make_image(0, size_wh), extension)).size == size_wh


def png_that_declares(width: int, height: int) -> bytes:
    """A few hundred bytes that claim to be a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"not an image at all", "not a JPEG, PNG or WebP image"),
        (b"GIF89a" + bytes(100), "not a JPEG, PNG or WebP image"),
        (image_bytes(make_image(0))[:60], "not a JPEG, PNG or WebP image|damaged image"),
        (image_bytes(make_image(0))[:-100], "damaged image: OSError: image file is truncated"),
        (image_bytes(make_image(0), "png")[:-400], "damaged image"),
        (image_bytes(make_image(0), "webp")[:-100], "not a JPEG, PNG or WebP image|damaged image"),
        (png_that_declares(20_000, 20_000), "decompression bomb"),
        (png_that_declares(9_500, 9_500), "decompression bomb: 9500x9500 pixels, at most 89478485"),
        (png_that_declares(100, 100), "damaged image"),
    ],
)
def test_an_unreadable_image_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason) as first:
        decode_image(data)
    with pytest.raises(UnreadableImageError) as second:
        decode_image(data)
    assert str(first.value) == str(second.value)
    assert "object at" not in str(first.value)


FILES = [image_bytes(make_image(2), extension) for extension in ("jpg", "png", "webp")] + [image_bytes(make_image(2).quantize(16), "png")]


@given(st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 10_000))
def test_damaged_bytes_give_an_image_or_a_reason(data: bytes, flips: list[tuple[int, int]], length: int) -> None:
    damaged = bytearray(data)
    for place, value in flips:
        damaged[place % len(damaged)] ^= value
    damaged = damaged[: len(damaged) - length % 50]
    try:
        image = decode_image(bytes(damaged))
    except UnreadableImageError:
        return
    assert image.mode == "RGB"
