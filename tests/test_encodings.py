"""Encodings: the stated error on hard values, finite on any, the same bits on every device setting, and old bytes decode for ever.

The files in tests/fixtures/encodings/ are what version 1 of each encoding wrote; they are never written again. Those of a
new encoding:  PYTHONPATH=tests python -c "import test_encodings; test_encodings.write_fixture('features', 'NAME[=ARGUMENT]')"
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdcache.arrays import array_spec, encode_chunk
from kdcache.encodings import ENCODINGS, ChannelStatistics, Encoding, TargetShape, build_encoding, default_encoding
from kdcache.encodings.dct import dct2, frequencies_of_bands, idct2
from kdcache.encodings.klt import KltFeatures
from kdcache.errors import UsageError
from kdcache.fidelity import Fidelity, combine_fidelity
from kdcache.testing import check_encoding

FIXTURES = Path(__file__).parent / "fixtures" / "encodings"
GOLDENS = Path(__file__).parent / "goldens"
ALL = [(kind, f"{name}={of.example}" if of.argument_name else name) for kind, encodings in ENCODINGS.items() for name, of in encodings.items()]
"""Every encoding that is registered, with the argument it names as its example."""
SMALL = {
    "logits": TargetShape(num_classes=37),
    "features": TargetShape(grid=(3, 4), channels=16, prefix_tokens=2),
}


def make_value(kind: str, shape: TargetShape, *, rows: int, seed: int, outlier: float = 1.0, massive: float = 1.0) -> dict[str, Tensor]:
    """Features: offset channels, three of them `outlier` times as wide, two grid tokens and the prefix `massive` times as large."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "logits":
        logits = torch.randn(rows, shape.num_classes, generator=generator)
        logits[torch.arange(rows), torch.arange(rows) % shape.num_classes] += 4 + 6 * torch.rand(rows, generator=generator)
        return {"logits": logits}
    width = torch.ones(shape.channels)
    width[torch.randperm(shape.channels, generator=generator)[:3]] = outlier
    offset = torch.randn(shape.channels, generator=generator) * width
    value = {"grid": torch.randn(rows, shape.num_tokens, shape.channels, generator=generator) * width + offset}
    value["grid"][:, :2] *= massive
    if shape.prefix_tokens:
        value["prefix"] = massive * (torch.randn(rows, shape.prefix_tokens, shape.channels, generator=generator) * width + offset)
    return value


def calibrated(kind: str, name: str, shape: TargetShape, value: dict[str, Tensor]) -> Encoding:
    encoding = build_encoding(kind, name, shape)
    if encoding.needs_calibration:
        calibrator = encoding.calibrator(f"{kind}@norm")
        assert calibrator is not None
        calibrator.update(value)
        encoding.load_calibration(calibrator.result())
    return encoding


def stored_bytes(encoding: Encoding, components: dict[str, Tensor]) -> float:
    """Bytes a row, all rows in one chunk, as the shard writer makes it."""
    total = 0
    for name, tensor in components.items():
        part = encoding.components()[name]
        spec = array_spec(name, part.dtype, part.shape, views=1, max_rows=len(tensor), typesize=part.typesize)
        rows = tensor.numpy().view(part.dtype)
        total += sum(len(encode_chunk(spec, rows[start : start + spec.chunk_rows])) for start in range(0, len(rows), spec.chunk_rows))
    return total / len(tensor)


def fidelity_of(encoding: Encoding, value: dict[str, Tensor]) -> dict[str, float]:
    fidelity = Fidelity(encoding.calibration if encoding.needs_calibration else None)
    assert fidelity.update(value, encoding.decode(encoding.encode(value)))
    return fidelity.result()


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_encodings_keep_the_contract(kind: str, name: str) -> None:
    grids = [((3, 4), 2), ((5, 3), 0), ((1, 1), 0), ((7, 7), 5)]
    features = [TargetShape(grid=grid, channels=16, prefix_tokens=prefix) for grid, prefix in grids]
    for shape in [SMALL["logits"], TargetShape(num_classes=10), TargetShape(num_classes=70_000)] if kind == "logits" else features:
        value = make_value(kind, shape, rows=5, seed=0, outlier=60, massive=100)
        check_encoding(calibrated(kind, name, shape, value), value)


@given(st.integers(0, 999), st.sampled_from([1.0, 60.0, 100.0]), st.sampled_from([1.0, 100.0]), st.sampled_from([48, 384]))
def test_int8_loses_less_than_a_bf16_teacher_does(seed: int, outlier: float, massive: float, channels: int) -> None:
    shape = TargetShape(grid=(6, 6), channels=channels, prefix_tokens=1)
    encoding = calibrated("features", "int8", shape, make_value("features", shape, rows=64, seed=seed, outlier=outlier, massive=massive))
    value = make_value("features", shape, rows=4, seed=seed, outlier=outlier, massive=massive)
    assert fidelity_of(encoding, value)["z_l2"] <= 0.01
    decoded = encoding.decode(encoding.encode(value))["grid"][:, 2:]  # the massive tokens must not hide the others
    std = encoding.calibration["grid_std"]
    ordinary = value["grid"][:, 2:]
    error = ((decoded - ordinary) / std).norm() / ((ordinary - encoding.calibration["grid_mean"]) / std).norm()
    assert float(error) <= 0.01


@given(st.integers(0, 999), st.sampled_from([1.0, 60.0]), st.sampled_from([1.0, 100.0]))
def test_fp16_loses_less_than_a_thousandth_of_each_value(seed: int, outlier: float, massive: float) -> None:
    value = make_value("features", SMALL["features"], rows=4, seed=seed, outlier=outlier, massive=massive)
    encoding = build_encoding("features", "fp16", SMALL["features"])
    decoded = encoding.decode(encoding.encode(value))
    for part, tokens in value.items():
        assert bool(((decoded[part] - tokens).abs() <= 1e-3 * tokens.abs() + 1e-7).all())


@given(st.integers(0, 999))
def test_dense_logits_take_a_kilobyte_and_keep_the_distribution_at_any_temperature(seed: int) -> None:
    shape = TargetShape(num_classes=1000)
    encoding = build_encoding("logits", "dense", shape)
    value = make_value("logits", shape, rows=64, seed=seed)
    result = fidelity_of(encoding, value)
    assert result["kl_t1"] <= 1e-4
    assert result["kl_t4"] <= 1e-4
    assert stored_bytes(encoding, encoding.encode(value)) <= 1000


@given(st.integers(0, 999), st.integers(1, 36))
def test_bf16_is_the_nearest_bfloat16_ties_to_even(seed: int, exponent: int) -> None:
    """Against the definition, in integer arithmetic on the float32 bits."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(3, 12, 16, generator=generator) * 10.0 ** (exponent - 18)
    halves = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], dtype=torch.int32).view(torch.float32)  # ties, and next to one
    grid[0, 0, :4] = halves
    encoding = build_encoding("features", "bf16", TargetShape(grid=(3, 4), channels=16))
    bits = grid.numpy().view(np.uint32).astype(np.uint64)
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    encoded = encoding.encode({"grid": grid})
    assert np.array_equal(encoded["grid"].numpy().view(np.uint16), expected)
    assert bool(((encoding.decode(encoded)["grid"] - grid).abs() <= 2.0**-8 * grid.abs()).all())
    largest = encoding.decode(encoding.encode({"grid": torch.full((1, 12, 16), torch.finfo(torch.float32).max)}))["grid"]
    assert float(largest[0, 0, 0]) == torch.finfo(torch.bfloat16).max


@given(st.integers(0, 999), st.sampled_from([(1, 37), (5, 37), (36, 37), (37, 37), (10, 1000)]), st.booleans())
def test_topk_keeps_the_largest_logits_the_label_and_the_normaliser(seed: int, k_of_classes: tuple[int, int], labelled: bool) -> None:
    k, num_classes = k_of_classes
    shape = TargetShape(num_classes=num_classes)
    logits = make_value("logits", shape, rows=16, seed=seed)["logits"]
    labels = torch.randint(-1, num_classes, (16,), generator=torch.Generator().manual_seed(seed)) if labelled else None
    encoding = build_encoding("logits", f"topk={k}", shape)
    decoded = encoding.decode(encoding.encode({"logits": logits}, labels))["logits"]
    error = (decoded - logits).abs()
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(k).indices, True)
    if labels is not None:
        known = labels >= 0
        kept[known] |= torch.nn.functional.one_hot(labels[known], num_classes).bool()
    assert float(error[kept].max()) <= 1 / 512 + 1e-5
    assert torch.allclose(decoded.logsumexp(1), logits.logsumexp(1), atol=1 / 256)
    for row, keep in zip(decoded, kept, strict=True):
        rest = row[~keep].sort().values  # one value, but for the next largest where no label takes its place
        assert len(rest) < 3 or bool((rest[:-1] == rest[0]).all())


def test_topk_10_takes_40_bytes_with_the_pixel_digest() -> None:
    shape = TargetShape(num_classes=1000)
    encoding = build_encoding("logits", "topk=10", shape)
    value = make_value("logits", shape, rows=1000, seed=0)
    labels = torch.randint(0, 1000, (1000,), generator=torch.Generator().manual_seed(0))
    assert 8 + stored_bytes(encoding, encoding.encode(value, labels)) <= 40


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("logits", "topk", r"'topk': expected an argument, e\.g\. topk=10, found 'none'"),
        ("logits", "topk=0", r"'topk=0': expected a whole number"),
        ("logits", "topk=2.5", r"'topk=2\.5': expected a whole number"),
        ("logits", "topk=many", r"'topk=many': expected a whole number"),
        ("logits", "topk=38", r"'topk=38': the teacher has 37 classes"),
        ("logits", "dense=8", r"'dense=8': expected none, found '8'"),
        ("features", "klt", r"'klt': expected an argument"),
        ("features", "klt=1", r"'klt=1': expected a mean cosine between 0 and 1"),
        ("features", "klt=nan", r"'klt=nan': expected a mean cosine"),
        ("features", "dct=3", r"'dct=3': expected none"),
        ("features", "int4", r"'int4' is not known for features; expected one of: int8, fp16, bf16, klt=COSINE, dct"),
    ],
)
def test_what_an_encoding_can_not_be_is_refused(kind: str, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        build_encoding(kind, text, SMALL[kind])


def test_the_largest_logit_stays_the_largest() -> None:
    value = make_value("logits", SMALL["logits"], rows=200, seed=1)
    encoding = build_encoding("logits", "dense", SMALL["logits"])
    assert torch.equal(encoding.decode(encoding.encode(value))["logits"].argmax(1), value["logits"].argmax(1))


def test_constant_logits_decode_to_themselves() -> None:
    encoding = build_encoding("logits", "dense", SMALL["logits"])
    value = {"logits": torch.tensor([[-2.5], [0.0], [1e-44]]).expand(3, 37)}
    assert torch.equal(encoding.decode(encoding.encode(value))["logits"], value["logits"])


def test_statistics_do_not_depend_on_batches_and_a_silent_channel_gets_the_median() -> None:
    value = make_value("features", SMALL["features"], rows=9, seed=0)
    value["grid"][..., 5] = 2.0
    one, many = ChannelStatistics(), ChannelStatistics()
    one.update(value)
    for row in range(9):
        many.update({part: tokens[row : row + 1] for part, tokens in value.items()})
    for name, tensor in one.result().items():
        assert torch.allclose(tensor, many.result()[name], rtol=1e-5, atol=1e-6)
    wide = value["grid"].double().flatten(0, 1)
    assert torch.allclose(one.result()["grid_mean"], wide.mean(0).float())
    alive = torch.arange(16) != 5
    std = wide.std(0, correction=0).float()[alive]
    assert torch.allclose(one.result()["grid_std"][alive], std.clamp_min(0.1 * std.median()))
    assert torch.allclose(one.result()["grid_std"][5], std.median())
    encoding = calibrated("features", "int8", SMALL["features"], value)
    assert torch.allclose(encoding.decode(encoding.encode(value))["grid"][..., 5], torch.tensor(2.0))


def test_fidelity_adds_up_over_shards_and_notices_what_is_not_finite() -> None:
    value = make_value("features", SMALL["features"], rows=8, seed=0)
    encoding = calibrated("features", "int8", SMALL["features"], value)
    parts = []
    for rows in (slice(0, 3), slice(3, 8)):
        part = {name: tokens[rows] for name, tokens in value.items()}
        fidelity = Fidelity(encoding.calibration)
        assert fidelity.update(part, encoding.decode(encoding.encode(part)))
        parts.append(fidelity.sums)
    whole = fidelity_of(encoding, value)
    assert combine_fidelity(parts) == pytest.approx(whole, rel=1e-4)
    assert whole["cosine"] > 0.9999
    silent = {name: tokens.clone() for name, tokens in value.items()}
    silent["grid"][:, 3] = 0  # has no direction to lose
    assert fidelity_of(encoding, silent)["cosine"] > 0.9999
    older = {name: number for name, number in parts[0].items() if name != "directed"}
    assert combine_fidelity([older, parts[1]]) == pytest.approx(whole, rel=1e-4)
    fidelity = Fidelity(encoding.calibration)
    value["grid"][0, 0, 0] = torch.nan
    assert not fidelity.update(value, value)
    assert fidelity.result() == {}


def fixture_path(kind: str, name: str) -> Path:
    return FIXTURES / f"{kind}-{name}.npz"


def write_fixture(kind: str, name: str) -> None:
    """Encode a small value and keep the components, the calibration and the decoded value. Refuses to replace a file."""
    value = make_value(kind, SMALL[kind], rows=3, seed=7, outlier=60, massive=100)
    encoding = calibrated(kind, name, SMALL[kind], value)
    components = encoding.encode(value, torch.tensor([-1, 0, 36]))
    arrays = {f"component:{key}": tensor.numpy() for key, tensor in components.items()}
    arrays |= {f"decoded:{key}": tensor.numpy() for key, tensor in encoding.decode(components).items()}
    if encoding.needs_calibration:
        arrays |= {f"calibration:{key}": tensor.numpy() for key, tensor in encoding.calibration.items()}
    with open(fixture_path(kind, name), "xb") as file:
        np.savez_compressed(file, **arrays)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_bytes_of_version_1_decode_for_ever(kind: str, name: str) -> None:
    parts: dict[str, dict[str, Tensor]] = {"component": {}, "decoded": {}, "calibration": {}}
    with np.load(fixture_path(kind, name)) as arrays:
        for key in arrays.files:
            part, _, field = key.partition(":")
            parts[part][field] = torch.from_numpy(arrays[key])
    encoding = build_encoding(kind, name, SMALL[kind])
    encoding.load_calibration(parts["calibration"])
    decoded = encoding.decode(parts["component"])
    assert decoded.keys() == parts["decoded"].keys()
    for key, tensor in decoded.items():
        expected = parts["decoded"][key]
        largest = expected.abs().flatten(0, -2).amax(dim=0)  # of each channel: a matrix product's last bits differ between machines
        assert bool(((tensor - expected).abs() <= 2e-6 * largest + 1e-6).all())
    # what was decoded is on the grid of codes: it encodes to within one code of itself
    again = encoding.encode(parts["decoded"], torch.tensor([-1, 0, 36]))
    for key, tensor in again.items():
        assert torch.allclose(tensor.float(), parts["component"][key].float(), rtol=1e-2, atol=1.0)


def test_the_first_encoding_of_a_kind_is_its_default() -> None:
    assert (default_encoding("logits"), default_encoding("features")) == ("dense", "int8")


@pytest.mark.parametrize("quiet", [0.0, 1e-9, 1e-3])
def test_int8_survives_a_channel_that_was_quiet_in_calibration_and_fires_later(quiet: float) -> None:
    """As dead units of a ReLU network do. One loud z-score must not drown the other channels of its token."""
    generator = torch.Generator().manual_seed(0)
    calibration, later = (torch.randn(64, 12, 16, generator=generator).relu() for _ in range(2))
    calibration[..., 3] *= quiet
    encoding = calibrated("features", "int8", TargetShape(grid=(3, 4), channels=16), {"grid": calibration})
    decoded = encoding.decode(encoding.encode({"grid": later}))["grid"]
    assert float((decoded - later).norm() / later.norm()) < 0.05


# --- klt ---


def correlated(shape: TargetShape, *, rows: int, seed: int) -> dict[str, Tensor]:
    """Tokens of a few directions, as a teacher's are, with outlier channels and, in each view, one massive token."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape.channels, shape.channels, generator=torch.Generator().manual_seed(0)) * 0.8 ** torch.arange(shape.channels).unsqueeze(
        1
    )
    grid = torch.randn(rows, shape.num_tokens, shape.channels, generator=generator) @ mixing
    grid[..., 3] *= 60
    grid[..., 5] += 500
    grid[:, 1] *= 20
    return {"grid": grid, "prefix": 100 * torch.randn(rows, shape.prefix_tokens, shape.channels, generator=generator)}


WIDE = TargetShape(grid=(6, 6), channels=48, prefix_tokens=2)


@pytest.mark.parametrize("cosine", ["0.9", "0.99", "0.9999"])
def test_klt_meets_the_stated_cosine_on_views_it_never_saw_and_is_no_finer_than_it_must(cosine: str) -> None:
    encoding = calibrated("features", f"klt={cosine}", WIDE, correlated(WIDE, rows=64, seed=1))
    value = correlated(WIDE, rows=32, seed=2)
    components = encoding.encode(value)
    decoded = encoding.decode(components)
    mean, std = encoding.calibration["grid_mean"], encoding.calibration["grid_std"]
    cosines = [
        float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1).mean())
        for one, other in ((value["grid"], decoded["grid"]), ((value["grid"] - mean) / std, (decoded["grid"] - mean) / std))
    ]
    missed, wanted = 1 - min(cosines), 1 - float(cosine)
    assert 0.7 * wanted <= missed <= 1.1 * wanted
    assert float((decoded["prefix"] - value["prefix"]).norm() / value["prefix"].norm()) < 0.01
    coarser = calibrated("features", "klt=0.8", WIDE, correlated(WIDE, rows=64, seed=1))
    assert stored_bytes(coarser, coarser.encode(value)) < stored_bytes(encoding, components)


def test_klt_chooses_its_step_on_views_of_the_whole_list_whose_first_may_be_bland() -> None:
    shape = TargetShape(grid=(4, 4), channels=32)
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    grid = torch.randn(160, 16, 32, generator=generator) * 0.9 ** torch.arange(32)
    grid[:32, :, 3:] *= 0.02
    value = {"grid": grid @ turn}
    encoding = calibrated("features", "klt=0.99", shape, value)
    decoded = encoding.decode(encoding.encode(value))["grid"][32:]
    assert 1 - float(torch.nn.functional.cosine_similarity(value["grid"][32:], decoded, dim=-1).mean()) < 0.013


@pytest.mark.parametrize("views", [2, 4])
def test_what_klt_tries_its_step_on_is_not_in_its_mean(views: int) -> None:
    """With one token a view, the last would be minus the sum of the others."""
    shape = TargetShape(grid=(1, 1), channels=64)
    grid = torch.randn(views + 20, 1, 64, generator=torch.Generator().manual_seed(0))
    encoding = calibrated("features", "klt=0.99", shape, {"grid": grid[:views]})
    decoded = encoding.decode(encoding.encode({"grid": grid[views:]}))["grid"]
    assert float(torch.nn.functional.cosine_similarity(decoded, grid[views:], dim=-1).mean()) > 0.97


def test_klt_coefficients_keep_distances_so_that_a_loss_may_be_taken_on_them() -> None:
    encoding = calibrated("features", "klt=0.99", WIDE, correlated(WIDE, rows=64, seed=1))
    assert isinstance(encoding, KltFeatures)
    value = correlated(WIDE, rows=2, seed=2)
    components = encoding.encode(value)
    mean, std, basis = (encoding.calibration[name] for name in ("grid_mean", "grid_std", "basis"))
    assert torch.allclose(basis.T @ basis, torch.eye(48), atol=1e-5)
    z, z_decoded = (value["grid"] - mean) / std, (encoding.decode(components)["grid"] - mean) / std
    distance = (z @ basis - encoding.decode_coefficients(components)).square().sum(dim=2)
    assert torch.allclose(distance, (z - z_decoded).square().sum(dim=2), rtol=1e-3, atol=1e-4)


def test_a_cosine_that_16_bits_can_not_meet_is_refused_with_the_best_there_is() -> None:
    with pytest.raises(UsageError, match=r"'features@norm': encoding 'klt=0\.999999999999' can't be met: wanted .* the best is 0\.9999"):
        calibrated("features", "klt=0.999999999999", WIDE, correlated(WIDE, rows=16, seed=1))
    with pytest.raises(UsageError, match="expected at least 2 readable samples, found 1"):
        calibrated("features", "klt=0.9", WIDE, correlated(WIDE, rows=1, seed=1))


def test_klt_calibration_depends_on_neither_batches_nor_the_signs_of_eigenvectors() -> None:
    encoding = build_encoding("features", "klt=0.99", WIDE)
    value = correlated(WIDE, rows=20, seed=1)
    results = []
    for size in (20, 7, 1):
        calibrator = encoding.calibrator("features@norm")
        assert calibrator is not None
        for start in range(0, 20, size):
            calibrator.update({part: tokens[start : start + size] for part, tokens in value.items()})
        results.append(calibrator.result())
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], rtol=1e-4, atol=1e-5), name
    assert all(float(column[column.abs().argmax()]) > 0 for column in results[0]["basis"].T)
    turned = {**results[2], "basis": results[2]["basis"] * torch.where(torch.arange(48) % 2 == 0, -1.0, 1.0)}
    assert encoding.is_near(turned, results[0])
    assert not encoding.is_near({**turned, "basis": torch.eye(48)}, results[0])
    assert not encoding.is_near({**turned, "basis": 1.1 * turned["basis"]}, results[0])
    assert not encoding.is_near({**turned, "step": 2 * turned["step"]}, results[0])


def test_klt_survives_fewer_tokens_than_channels_and_tokens_of_zeros() -> None:
    shape = TargetShape(grid=(2, 2), channels=48)
    value = {"grid": correlated(WIDE, rows=4, seed=1)["grid"][:, 2:6]}
    value["grid"][:, 0] = 0
    encoding = calibrated("features", "klt=0.95", shape, value)
    check_encoding(encoding, {"grid": correlated(WIDE, rows=3, seed=2)["grid"][:, 2:6]})


# --- dct ---


@pytest.mark.parametrize("side", [7, 14, 16])
def test_the_transform_is_the_originals_and_the_bands_without_dc_are_scalekds_frequency_view(side: int) -> None:
    with np.load(GOLDENS / "scalekd_dct.npz") as golden:
        x, unnormalised, without_dc = (torch.from_numpy(golden[f"{name}{side}"]) for name in ("x", "dct", "idct_nodc"))
    tokens = x.flatten(2).transpose(1, 2)  # (B, T, C)
    coefficients = dct2(tokens, (side, side))
    scale = torch.full((side, 1), math.sqrt(1 / (2 * side)))  # W[k, i] = 2 cos: norm √(2n), but 2√n for k = 0
    scale[0] /= math.sqrt(2)
    expected = (unnormalised * scale * scale.T).flatten(2).transpose(1, 2)
    assert torch.allclose(coefficients, expected.float(), rtol=1e-5, atol=1e-5)
    assert torch.allclose(idct2(coefficients, (side, side)), tokens, atol=1e-5)
    coefficients[:, frequencies_of_bands((side, side))["dc"]] = 0
    assert torch.allclose(idct2(coefficients, (side, side)), without_dc.float().flatten(2).transpose(1, 2), atol=1e-5)


@given(st.integers(1, 20), st.integers(1, 20))
def test_bands_are_a_partition_by_radius(height: int, width: int) -> None:
    bands = frequencies_of_bands((height, width))
    assert sorted(place for places in bands.values() for place in places) == list(range(height * width))
    bounds = {"dc": (0, 0), "low": (1e-12, 1 / 4), "mid": (1 / 4, 1 / 2), "high": (1 / 2, 2)}
    for band, places in bands.items():
        for place in places:
            radius = math.hypot(place // width / height, place % width / width)
            assert bounds[band][0] - 1e-9 <= radius <= bounds[band][1] + 1e-9


@given(st.integers(0, 99), st.sampled_from([(14, 14), (7, 7), (5, 3)]), st.sampled_from([1.0, 100.0]))
def test_every_band_is_kept_to_a_hundredth_and_any_subset_decodes(seed: int, grid: tuple[int, int], massive: float) -> None:
    shape = TargetShape(grid=grid, channels=24, prefix_tokens=1)
    encoding = calibrated("features", "dct", shape, make_value("features", shape, rows=32, seed=seed, outlier=60))
    value = make_value("features", shape, rows=3, seed=seed, outlier=60, massive=massive)
    components = encoding.encode(value)
    mean, std = encoding.calibration["grid_mean"], encoding.calibration["grid_std"]
    detail = value["grid"] - value["grid"].mean(dim=1, keepdim=True)
    without_dc = encoding.decode({name: components[name] for name in encoding.components_of(["low", "mid", "high"])})
    assert without_dc.keys() == {"grid"}
    assert float(((without_dc["grid"] - detail) / std).norm()) < 0.01 * float((detail / std).norm())
    fidelity = Fidelity(encoding.calibration, encoding.bands)
    assert fidelity.update(value, encoding.decode(components))
    result = fidelity.result()
    assert sum(result[f"energy_{band}"] for band in ("dc", "low", "mid", "high")) == pytest.approx(1)
    assert all(result[f"error_{band}"] < 0.01 for band in ("dc", "low", "mid", "high"))
    smooth = {"grid": (mean + std).expand(2, shape.num_tokens, -1), "prefix": value["prefix"][:2]}
    only_dc = Fidelity(encoding.calibration, encoding.bands)
    assert only_dc.update(smooth, smooth)
    assert only_dc.result()["energy_dc"] == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e25, 1e37])
def test_fidelity_holds_for_any_finite_size_of_value(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    value = {"grid": torch.randn(4, 12, 16, generator=generator)}
    calibrator = ChannelStatistics()
    calibrator.update(value)
    calibration = {name: tensor * scale for name, tensor in calibrator.result().items()}
    error = 0.01 * torch.randn(4, 12, 16, generator=generator)
    plain, scaled = Fidelity(calibrator.result()), Fidelity(calibration)
    assert plain.update(value, {"grid": value["grid"] + error})
    assert scaled.update({"grid": value["grid"] * scale}, {"grid": (value["grid"] + error) * scale})
    assert scaled.result() == pytest.approx(plain.result(), rel=1e-3)
    assert scaled.update({"grid": torch.zeros(4, 12, 16)}, {"grid": calibration["grid_mean"].expand(4, 12, 16)}), "a silent batch is finite"
