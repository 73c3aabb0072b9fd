"""How the page of pipelines reads what their steps were."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any

from tools.pipelines.measure import Row, expected, plans

PLAN = expected(12)


def steps(plan: str, lost: str = "") -> list[Any]:
    """The calls of one branch by its letters; ``lost`` has an x where nothing was kept."""
    reasons = ("nothing kept" if mark == "x" else "planned" for mark in lost.ljust(len(plan)))
    return [
        SimpleNamespace(
            run=0,
            component="transformer",
            branch="",
            index=index,
            kind="full" if letter == "F" else "skip",
            reason=reason,
        )
        for index, (letter, reason) in enumerate(zip(plan, reasons, strict=True))
        if letter != " "
    ]


def read(*branches: list[Any]) -> str:
    (plan,) = plans(SimpleNamespace(steps=[*chain(*branches)])).values()  # type: ignore[arg-type]
    return plan


def test_the_expected_plan() -> None:
    assert PLAN == "FFppFppFppFF"
    assert expected(8) == "FFppFpFF"
    assert expected(4) == "FFFF"


def test_branches_that_do_alike() -> None:
    assert read(steps(PLAN)) == PLAN
    assert read(steps(PLAN), steps(PLAN)) == PLAN
    assert read(steps(PLAN), steps("F" * 12)) == "FF??F??F??FF"


def test_a_branch_may_begin_later() -> None:
    assert read(steps(PLAN), steps("  FpFpp     ", "  x")) == PLAN


def test_a_branch_that_loses_its_memories_is_seen() -> None:
    assert read(steps(PLAN), steps("F" * 12, "  xx xx xx  ")) == "FF??F??F??FF"
    assert read(steps("F" * 12, "  xx xx xx  ")) == "F" * 12


def test_what_is_right() -> None:
    row = Row("a", plans={"0/transformer/": PLAN}, exact=True, again=True)
    assert row.right
    for wrong in (
        {"plans": {}},
        {"plans": {"0/transformer/": "F" * 12}},
        {"exact": False},
        {"again": False},
        {"warnings": ["slow"]},
        {"decode_bytes": 8},
        {"after_bytes": 8},
        {"problem": "refused"},
    ):
        assert not Row(**{**row.to_dict(), **wrong}).right
