"""Target specs: the grammar that users type, and what merging several of them gives."""

from __future__ import annotations

import pytest

from kdcache.errors import UsageError
from kdcache.targets import TargetSpec, merge_targets, parse_target


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("logits", TargetSpec(kind="logits")),
        ("logits:dense,views=3", TargetSpec(kind="logits", encoding="dense", views=3)),
        ("features@blocks.-1:int8", TargetSpec(kind="features", node="blocks.-1", encoding="int8")),
        ("features@norm:klt=0.995,views=4", TargetSpec(kind="features", node="norm", encoding="klt=0.995", views=4)),
        ("features@norm:klt=.9950", TargetSpec(kind="features", node="norm", encoding="klt=0.995")),
        ("logits:topk=010.0", TargetSpec(kind="logits", encoding="topk=10")),
        ("logits:topk=1e2", TargetSpec(kind="logits", encoding="topk=100")),
        ("features@layers.3:dct,views=1", TargetSpec(kind="features", node="layers.3", encoding="dct", views=1)),
        ("features@norm:klt=near", TargetSpec(kind="features", node="norm", encoding="klt=near")),
        ("features@layer1,views=2", TargetSpec(kind="features", node="layer1", views=2)),
    ],
)
def test_specs_are_parsed(text: str, expected: TargetSpec) -> None:
    assert parse_target(text) == expected
    assert expected.name == text.partition(":")[0].partition(",")[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "logit",
        "logits@norm",
        "features",
        "features@",
        "features@a/b",
        "features@..",
        "logits:",
        "logits,views=0",
        "logits,views=-1",
        "logits\n",
        "logits:a b",
        "logits:topk=",
        "logits:=10",
        "logits:topk=10,10",
    ],
)
def test_what_is_no_spec_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(UsageError, match="target"):
        parse_target(text)


def test_specs_of_one_name_are_merged() -> None:
    merged = merge_targets(
        map(parse_target, ["logits", "features@norm:int8", "logits:dense,views=2", "features@norm,views=4", "features@norm:int8,views=3"])
    )
    assert merged == [
        TargetSpec(kind="logits", encoding="dense", views=2),
        TargetSpec(kind="features", node="norm", encoding="int8", views=4),
    ]


def test_one_name_in_two_encodings_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'features@norm' is asked for as 'int8' and as 'fp16'"):
        merge_targets(map(parse_target, ["features@norm:int8", "features@norm", "features@norm:fp16"]))
