"""What each choice in `klt` and `dct` gains, at the same cosine: the figures in their docstrings.

    python benchmarks/klt_choices.py [--features FILE]

On the ViT-L of `encodings.py`, as it is there and with every 37th grid token eight times as large. Prints bytes a view of the grid's codes.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from kdcache.arrays import encode_chunk
from kdcache.encodings import build_encoding, dct, klt
from kdcache.encodings.base import STD_FLOOR, standardise
from kdcache.encodings.int8 import decode_tokens, encode_tokens


def load_benchmark() -> ModuleType:
    """benchmarks/encodings.py, whose name is taken by the standard library."""
    spec = importlib.util.spec_from_file_location("encodings_benchmark", Path(__file__).with_name("encodings.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=96)
    parser.add_argument("--features", type=Path, metavar="FILE", help="as in encodings.py")
    args = parser.parse_args()
    benchmark = load_benchmark()
    plain = benchmark.vit_l_cases(args.views, args.features)[0]

    def with_massive(value: dict[str, Tensor]) -> dict[str, Tensor]:
        grid = value["grid"].clone()
        grid[:, ::37] *= 8
        return {**value, "grid": grid}

    massive = replace(plain, calibration=with_massive(plain.calibration), measured=with_massive(plain.measured))
    own_scale, rounding = klt.to_coefficients, klt._ROUNDING

    def one_scale(z_BTC: Tensor, basis_CC: Tensor) -> tuple[Tensor, Tensor]:
        y_BTC, scale_BT = own_scale(z_BTC, basis_CC)
        return y_BTC, torch.ones_like(scale_BT)

    def size(case: object, *, to_coefficients: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], rounding: float, zigzag: bool) -> float:
        klt.to_coefficients, klt._ROUNDING = to_coefficients, rounding
        encoding = build_encoding("features", "klt=0.99", plain.shape)
        calibrator = encoding.calibrator("features")
        assert calibrator is not None
        calibrator.update(case.calibration)  # type: ignore[attr-defined]
        encoding.load_calibration(calibrator.result())
        codes = encoding.encode(case.measured)["grid"].numpy().view("uint16").astype("int32")  # type: ignore[attr-defined]
        if not zigzag:
            codes = (codes >> 1) ^ -(codes & 1)
        spec = benchmark.specs_of(plain, encoding, len(codes))["grid"]
        return sum(len(encode_chunk(spec, row[None].astype("uint16"))) for row in codes) / len(codes)

    print(f"{'klt=0.99':<34} {'plain':>9} {'massive':>9}")
    for title, scale, rounds, zigzag in (
        ("as it is", own_scale, rounding, True),
        ("one step for all tokens", one_scale, rounding, True),
        ("rounding to nearest", own_scale, 0.5, True),
        ("two's complement", own_scale, rounding, False),
    ):
        sizes = [size(case, to_coefficients=scale, rounding=rounds, zigzag=zigzag) for case in (plain, massive)]
        print(f"{title:<34} {sizes[0]:9,.0f} {sizes[1]:9,.0f}")

    print(f"\n{'dct, z_l2 of the grid':<34} {'plain':>9} {'massive':>9}")
    for title, by_frequency in (("scale by view and frequency", False), ("and by frequency and channel", True)):
        errors = []
        for case in (plain, massive):
            encoding = build_encoding("features", "int8", plain.shape)
            calibrator = encoding.calibrator("features")
            assert calibrator is not None
            calibrator.update(case.calibration)
            mean, std = (calibrator.result()[f"grid_{name}"] for name in ("mean", "std"))
            fitted, y = (dct.dct2(standardise(value["grid"], mean, std), plain.shape.grid) for value in (case.calibration, case.measured))
            spread = fitted.std(dim=0) if by_frequency else torch.ones(())
            if by_frequency:
                spread = spread.clamp_min(STD_FLOOR * spread.median(dim=1, keepdim=True).values)
            error = decode_tokens(*encode_tokens(y / spread)) * spread - y
            errors.append(float(error.norm() / y.norm()))
        print(f"{title:<34} {errors[0]:9.4f} {errors[1]:9.4f}")


if __name__ == "__main__":
    main()
