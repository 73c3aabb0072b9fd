"""Compiled by toca_fx with the reference policies, the models give the authors' numbers, step by
step. Schedules: test_schedules.py; what is forecast: test_forecasts.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import toca_fx
from tests.helpers import newest, record_choices
from tests.marks import slow_but
from tests.system.conformance.cases import AUTHORS, CASES, FORECASTS, HERE, Case, load_case
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.plan import Plan
from toca_fx.plan.units import WHOLE
from toca_fx.runtime.generation import Generation
from toca_fx.runtime.storage import Storage

pytestmark = pytest.mark.usefixtures("keep_memories")

TOLERANCE = 2e-5  # max abs; one wrong rule gives 0.4 or more, one flipped token 4e-2
NEAR_TIES = 2  # selections of a run that may have two neighbours in the other order


def own_case(name: str) -> Case:
    """A case on the authors' own model."""
    return load_case(name, own=True)


def test_the_vectors_stay_small() -> None:
    assert sum(file.stat().st_size for file in HERE.iterdir() if file.is_file()) < 20_200_000


@pytest.mark.parametrize("name", [*CASES, *FORECASTS])
def test_full_steps_equal_the_untouched_model(name: str) -> None:
    """The weights and the way to call the model are right: nothing changes on full steps."""
    _assert_full_steps_equal(load_case(name))


def _assert_full_steps_equal(case: Case) -> None:
    model = case.model()
    full = [call for call in range(case.steps) if case.step_kind(call) == "full"]
    assert full
    with torch.no_grad():
        for call in full:
            torch.testing.assert_close(
                case.run(model, call), case.expected(call), rtol=0, atol=2e-5, msg=f"call {call}"
            )


@pytest.mark.parametrize(
    "name",
    slow_but(
        set(CASES) - {"duca_dit50_vnorm"},
        CASES,
        "another score on the model of the other DuCa; test_forecasts.py has its outputs",
    ),
)
def test_every_step_equals_the_authors_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _assert_equal(load_case(name), monkeypatch)


@pytest.mark.parametrize("name", AUTHORS)
def test_full_steps_of_the_authors_own_models_equal_theirs(name: str) -> None:
    _assert_full_steps_equal(own_case(name))


@pytest.mark.parametrize(
    "name",
    slow_but(["dit_ddim50"], AUTHORS, "one of the models is enough"),
)
def test_every_step_of_the_authors_own_models_equals_theirs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _assert_equal(own_case(name), monkeypatch)


@pytest.mark.slow(reason="the video of the reference vectors, once more")
def test_video_frames_that_are_all_to_be_made_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Open-Sora's samplers always pass x_mask; without given frames it is true everywhere."""
    _assert_equal(
        load_case("opensora_rflow30"), monkeypatch, x_mask=torch.ones(2, 4, dtype=torch.bool)
    )


def _assert_equal(case: Case, monkeypatch: pytest.MonkeyPatch, **extra: torch.Tensor) -> None:
    record = record_choices(monkeypatch)
    fast = toca_fx.compile(case.model(), case.kind.policy, inner="eager")
    with torch.no_grad(), toca_fx.session(timesteps=case.timesteps) as run:
        chosen, reordered = 0, 0
        for call in range(case.steps):
            record.clear()
            error = (case.run(fast, call, **extra) - case.expected(call)).abs().max().item()
            generation, storage = newest(run)
            ordered = dict(pair for _, choices in record for pair in choices.items())
            picked = _picked(generation, storage, call)
            for key in case.keys:
                path, theirs = case.path(key), case.fresh(key, call)
                assert picked.get(path, [set()] * len(theirs)) == [
                    set(tokens) for tokens in theirs
                ], f"call {call}, {path}"
                reordered += _other_order(ordered[path], theirs) if path in ordered else 0
                chosen += len(theirs[0])
            assert error <= TOLERANCE, f"call {call}"
        assert chosen > 1000
        assert reordered <= NEAR_TIES
        _assert_plan(case, generation.plan)
    assert [step.kind for step in run.report().steps] == [
        case.step_kind(call) for call in range(case.steps)
    ]


def _picked(generation: Generation, storage: Storage, call: int) -> dict[str, list[set[int]]]:
    """Of each module that computes some of its tokens, per sample which."""
    plan = generation.plan
    partial = [at for at, mode in enumerate(plan.steps[call].modes) if mode == "partial"]
    return {
        plan.sites[at].path: [
            set(row.nonzero().flatten().tolist()) for row in storage.buffers[Buffer("picked", at)]
        ]
        for at in partial
    }


def _other_order(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> int:
    """How many samples have the same tokens, but two neighbours exchanged; any other order is an
    error.
    """
    exchanged = 0
    for mine, yours in zip(ours, theirs, strict=True):
        apart = [at for at, pair in enumerate(zip(mine, yours, strict=True)) if pair[0] != pair[1]]
        assert not apart or apart[1:] == [apart[0] + 1], f"{mine} is not the order {yours}"
        exchanged += bool(apart)
    return exchanged


def _assert_plan(case: Case, plan: Plan) -> None:
    """Full, partial or skipped per module, and K, at every call."""
    counts = {case.path(key): case.count(key) for key in case.facts["K"]}
    assert set(counts) <= {site.path for site in plan.sites}
    for at, site in enumerate(plan.sites):
        if site.kind in WHOLE:
            continue
        modes = [step.modes[at] for step in plan.steps]
        letters = {"full": "F", "skip": "S"}
        assert "".join(letters.get(mode, "P") for mode in modes) == case.letters(site.path), (
            site.path
        )
        ours = [
            None if mode in letters else step.fresh[at]
            for mode, step in zip(modes, plan.steps, strict=True)
        ]
        reused = [None if mode in letters else 0 for mode in modes]
        # In FLUX's own single blocks an attention has the path of the block, as the MLP has.
        attends = site.kind in ("self_attention", "joint_attention")
        assert ours == (reused if attends else counts.get(site.path, reused)), site.path
