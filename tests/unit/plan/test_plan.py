"""Schedules, numbers of fresh tokens, modes and rules, without a model."""

from __future__ import annotations

import random
import re
import time
from dataclasses import replace
from typing import Any

import pytest

from tests import reference_schedules as reference
from tests.helpers import make_policy
from toca_fx import PolicyError
from toca_fx.match.sites import Matches, NearMiss, Site
from toca_fx.plan.plan import Plan, StepPlan
from toca_fx.plan.planner import make_plan
from toca_fx.plan.schedule import fresh_tokens, full_steps, skipped_steps
from toca_fx.policy import (
    Action,
    Interval,
    Ratio,
    Scores,
    SitePolicy,
    Skip,
    Window,
    load_policy,
)


def make_matches(layers: int = 4, tokens: int = 64, block: str = "blocks") -> Matches:
    sites = []
    for layer in range(layers):
        for kind, name in (("self_attention", "attn"), ("mlp", "mlp")):
            sites.append(
                Site(
                    kind,
                    f"{block}.{layer}.{name}",
                    layer,
                    block,
                    f"o{len(sites)}",
                    f"a{len(sites)}",
                    (2, tokens, 8),
                    2 * layer,
                )
            )
    return Matches(tuple(sites), ())


def kinds(plan: Plan) -> list[str]:
    return [step.kind for step in plan.steps]


def full_indices(plan: Plan) -> list[int]:
    return [step.index for step in plan.steps if step.kind == "full"]


@pytest.mark.parametrize(
    ("interval", "steps", "order", "expected"),
    [
        (Interval(3), 10, "ascending", [0, 3, 6, 9]),
        (Interval(3, first=3), 10, "ascending", [0, 1, 2, 5, 8]),
        (Interval(4, last=2), 10, "ascending", [0, 4, 8, 9]),
        (Interval(3, phase="modulo"), 10, "descending", [9, 6, 3, 0]),
        (Interval(4, phase="modulo"), 10, "descending", [9, 8, 4, 0]),
        (Interval(3, extra_full_steps=(4,)), 10, "ascending", [0, 3, 4, 7]),
        (Interval(3, full_steps=(0, 7), last=1), 10, "ascending", [0, 7, 9]),
        (Interval(4, windows=(Window(0.4, 0.8, 2),)), 10, "ascending", [0, 4, 6, 8]),
        (Interval(1), 4, "ascending", [0, 1, 2, 3]),
        (Interval(3, last=9), 4, "ascending", [0, 1, 2, 3]),
        # N(3) = 2 / (1 + 0.4 - 2 * 0.4 * 3 / 4) is 2.5, to even 2; in binary it is more, and 3.
        (Interval(2, drift=0.4, phase="modulo"), 4, "descending", [3, 2, 0]),
        (Interval(2, drift=0.4), 4, "descending", [3, 1]),
        # 0.14 * 50 and 0.28 * 25 are 7; in binary they are more, and 7 on the other side.
        (
            Interval(7, windows=(Window(0.14, 0.3, 2),)),
            50,
            "ascending",
            [0, 7, 9, 11, 13, *range(15, 50, 7)],
        ),
        (Interval(9, windows=(Window(0.0, 0.28, 1),)), 25, "ascending", [*range(8), 16]),
        # PixArt and FLUX of the method's section 4, and Open-Sora's cross-attention.
        (Interval(3, drift=-0.2, phase="modulo"), 20, "ascending", [0, 6, 9, 12, 15, 18]),
        (Interval(3, drift=-0.2, phase="due"), 20, "ascending", [0, 4, 6, 9, 12, 15, 18]),
        (Interval(4, first=3), 50, "ascending", [0, 1, 2, *range(6, 50, 4)]),
        (Interval(6, first=3, phase="modulo"), 30, "ascending", [0, 1, 2, 6, 12, 18, 24]),
        (
            Interval(3, first=3, phase="modulo"),
            30,
            "ascending",
            [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27],
        ),
        # Spectrum's windows of 2, 2, 2.75, 3.5 ... steps, the first full steps aside.
        (
            Interval(2, growth=0.75, first=5),
            50,
            "ascending",
            [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46],
        ),
        (
            Interval(2, growth=3, first=5),
            50,
            "descending",
            [49, 48, 47, 46, 45, 43, 38, 30, 19, 5],
        ),
        # 2 + 0.1 * 10 is 3; in binary ten times 0.1 is less.
        (Interval(2, growth=0.1), 30, "ascending", [*range(0, 22, 2), 23, 26, 29]),
        (Interval(2, growth=1, extra_full_steps=(3,)), 20, "ascending", [0, 2, 3, 7, 12, 18]),
        (
            Interval(2, growth=1, windows=(Window(0.5, 1.0, 2),)),
            20,
            "ascending",
            [0, 2, 5, 9, 14, 16, 18],
        ),
        # The base grows, the slope holds: 2 / 1.4, 3 / 1.4 ... at the beginning.
        (Interval(2, drift=0.5, growth=1), 20, "ascending", [0, 1, 3, 6, 10, 16]),
        # Shares: of the first steps rounded up, of the last ones rounded, half to even.
        (Interval(9, first=0.2), 20, "ascending", [0, 1, 2, 3, 12]),
        (Interval(9, first=0.21), 20, "ascending", [0, 1, 2, 3, 4, 13]),
        (Interval(9, first=0.07), 100, "ascending", [*range(7), *range(15, 100, 9)]),
        (Interval(9, first=0.001), 20, "ascending", [0, 9, 18]),
        (Interval(30, last=0.125), 20, "descending", [19, 1, 0]),
        (Interval(30, last=0.02), 20, "ascending", [0]),
        # Places.
        (Interval(full_steps=(0, 0.1, 0.28, 0.5)), 10, "ascending", [0, 1, 2, 5]),
        (Interval(full_steps=(0, 0.1, 0.28, 0.5)), 25, "ascending", [0, 2, 7, 12]),
        (Interval(full_steps=(0.14, 0.98)), 50, "descending", [49, 7]),
        (Interval(full_steps=(0.5,), last=0.2, first=2), 10, "ascending", [0, 1, 5, 8, 9]),
    ],
)
def test_full_steps(interval: Interval, steps: int, order: str, expected: list[int]) -> None:
    indices = list(range(steps)) if order == "ascending" else list(range(steps - 1, -1, -1))
    found = full_steps(interval, indices, steps)
    assert [s for s in indices if s in found] == expected


def test_many_first_steps_are_looked_up_and_not_searched() -> None:
    steps = 100_000
    interval = Interval(3, first=steps, phase="modulo")
    began = time.perf_counter()
    assert len(full_steps(interval, range(steps), steps)) == steps
    assert time.perf_counter() - began < 20  # a search takes minutes


def test_full_steps_equal_a_walk_through_the_loop() -> None:
    chance = random.Random(0)
    for _ in range(300):
        steps = chance.randint(2, 60)
        start = chance.choice([0.0, 0.25, 0.5])
        interval = Interval(
            base=chance.randint(1, 7),
            drift=chance.choice([0.0, 0.4, -0.4, 0.25, -0.9]),
            growth=chance.choice([0.0, 0.0, 0.5, 0.75, 2.0]),
            first=chance.choice([1, 2, 3, 0.1, 0.25]),
            last=chance.choice([0, 1, 2, 0.1]),
            phase=chance.choice(["count", "modulo", "due"]),
            windows=(Window(start, start + 0.25, chance.randint(1, 4)),)
            if chance.random() < 0.5
            else (),
            extra_full_steps=tuple(chance.sample(range(steps), k=min(steps, chance.randint(0, 2)))),
        )
        order = list(range(steps)) if chance.random() < 0.5 else list(range(steps - 1, -1, -1))
        assert full_steps(interval, order, steps) == reference.full_steps(interval, order, steps), (
            interval,
            steps,
            order[0],
        )


def by_step(kinds: str, order: str = "ascending") -> dict[int, str]:
    """F, P or S by step index, from one letter per call."""
    indices = range(len(kinds)) if order == "ascending" else range(len(kinds) - 1, -1, -1)
    return dict(zip(indices, kinds, strict=True))


@pytest.mark.parametrize(
    ("interval", "skip", "order", "kinds"),
    [
        (Interval(4), "none", "ascending", "FPPPFPPPFP"),
        (Interval(4), "all", "ascending", "FSSSFSSSFS"),
        (Interval(4), (1, 4, 6), "ascending", "FSPPFPSPFP"),
        (Interval(4), (1, 4, 6), "descending", "FPPSFSPPFP"),
        # With a count the distance to the next full step decides, and the end is one.
        (Interval(4), "alternate", "ascending", "FPSPFPSPFP"),
        (Interval(5), "alternate", "ascending", "FSPSPFSPSP"),
        (Interval(5), "alternate", "descending", "FSPSPFSPSP"),
        (Interval(5, last=1), "alternate", "ascending", "FSPSPFPSPF"),
        (Interval(2, growth=1), "alternate", "ascending", "FPFSPFPSPFSPSP"),
        (Interval(full_steps=(0, 3, 8), phase="modulo"), "alternate", "ascending", "FSPFSPSPFP"),
        (Interval(full_steps=(0, 0.3)), "alternate", "ascending", "FSPFSPSPSP"),
        # With modulo s itself counts, upwards on PixArt: the step behind a full one is partial.
        (Interval(4, phase="modulo"), "alternate", "ascending", "FPSPFPSPFP"),
        (Interval(5, phase="modulo"), "alternate", "ascending", "FPSPSFPSPS"),
        (Interval(5, phase="modulo"), "alternate", "descending", "FSPSPFSPSPF"),
    ],
)
def test_skipped_steps(interval: Interval, skip: Skip, order: str, kinds: str) -> None:
    wanted = by_step(kinds, order)
    full = full_steps(interval, tuple(wanted), len(wanted))
    skipped = skipped_steps(interval, skip, "module", tuple(wanted), len(wanted))
    found = {s: "F" if s in full else "S" if s in skipped else "P" for s in wanted}
    assert "".join(found.values()) == kinds


def test_steps_that_duca_skips_on_dit() -> None:
    """Call by call the kind of layers 1 to 27 under DuCa's own code, DDIM-50."""
    interval = load_policy("reference/dit-xl-2-ddim50").N
    kinds = "FPSPPFPSPFPSPFPSPSPFSPFSPFSPFSPFPFPFPFPFPFPFPFPFPF"
    wanted = by_step(kinds, "descending")
    full = full_steps(interval, tuple(wanted), 50)
    skipped = skipped_steps(interval, "alternate", "module", tuple(wanted), 50)
    assert full == {s for s, kind in wanted.items() if kind == "F"}
    assert skipped == {s for s, kind in wanted.items() if kind == "S"}


@pytest.mark.parametrize("skip", ["none", "all"])
def test_with_the_grain_of_the_model_all_steps_between_full_ones_are_skipped(skip: Skip) -> None:
    interval = Interval(4, last=1)
    assert skipped_steps(interval, skip, "model", range(10), 10) == {1, 2, 3, 5, 6, 7}


def site_policy(ratio: Ratio, weight: float = 1.0) -> SitePolicy:
    return SitePolicy(Interval(3), ratio, Action("partial", weight), Scores(), None)


@pytest.mark.parametrize(
    ("ratio", "weight", "s", "layer", "tokens", "expected"),
    [
        (Ratio(0.5), 1.0, 0, 0, 64, 32),
        (Ratio(0.93), 1.0, 0, 0, 64, 4),  # trunc(4.48)
        (Ratio(0.93), 1.0, 0, 0, 100, 7),  # 1 - 0.93 is 0.06999... in binary
        (Ratio(0.7), 1.0, 0, 0, 10, 3),
        (Ratio(0.9, step_weight=0.6), 0.5, 15, 0, 100, 3),  # 0.1 * 0.7 * 0.5 * 100 is 3.5
        (Ratio(0.9, step_weight=0.2), 2.0, 0, 0, 100, 24),  # 0.1 * 1.2 * 2.0 * 100
        (Ratio(0.93), 2.5, 0, 0, 256, 44),  # trunc(44.8)
        (Ratio(1.0), 3.0, 0, 0, 64, 0),
        (Ratio(0.0), 1.0, 0, 0, 64, 64),
        (Ratio(0.5), 9.0, 0, 0, 64, 64),  # never more than all
        (Ratio(0.5, step_weight=-2.0), 1.0, 0, 0, 64, 0),  # never less than none
        (Ratio(0.5, step_weight=0.5), 1.0, 0, 0, 64, 48),
        (Ratio(0.5, step_weight=0.5), 1.0, 10, 0, 64, 32),
        (Ratio(0.5, step_weight=0.5), 1.0, 20, 0, 64, 16),
        (Ratio(0.5, layer_weight=0.5), 1.0, 0, 0, 64, 48),
        (Ratio(0.5, layer_weight=0.5), 1.0, 0, 4, 64, 16),
        (Ratio(0.5, layer_weight=0.5, layer_span=8), 1.0, 0, 4, 64, 32),
        (Ratio(0.93, multiple=16), 1.0, 0, 0, 256, 32),  # 17 rounded up
        (Ratio(0.5, multiple=16), 1.0, 0, 0, 64, 32),
        (Ratio(0.0, multiple=16), 1.0, 0, 0, 100, 100),  # never more than all
        (Ratio(1.0, multiple=16), 1.0, 0, 0, 64, 0),  # none stays none
    ],
)
def test_fresh_tokens(
    ratio: Ratio, weight: float, s: int, layer: int, tokens: int, expected: int
) -> None:
    assert fresh_tokens(site_policy(ratio, weight), s, 20, layer, 4, tokens) == expected


def test_fresh_tokens_equal_the_reference() -> None:
    chance = random.Random(1)
    for _ in range(500):
        ratio = Ratio(
            round(chance.random(), 2),
            round(chance.uniform(-2, 2), 1),
            round(chance.uniform(-1, 1), 1),
            chance.choice([None, 27]),
        )
        total, layers, tokens = (
            chance.randint(1, 50),
            chance.randint(1, 28),
            chance.choice([16, 64, 256, 1000]),
        )
        s, layer, policy = (
            chance.randrange(total),
            chance.randrange(layers),
            site_policy(ratio, chance.choice([1.0, 2.5, 0.6])),
        )
        expected = reference.fresh_count(policy, s, total, layer, layers - 1, tokens)
        assert fresh_tokens(policy, s, total, layer, layers - 1, tokens) == expected, (
            policy,
            s,
            total,
            layer,
        )


def test_modes_of_the_default() -> None:
    plan = make_plan(make_matches(), make_policy())
    assert kinds(plan) == ["full", "partial", "partial"] * 4
    assert plan.steps[0] == StepPlan(0, ("full",) * 8, (64,) * 8)
    assert plan.steps[1] == StepPlan(1, ("reuse", "partial") * 4, (0, 32) * 4)
    assert plan.cached == tuple(range(8))
    assert plan.scored == plan.scored_by_attention == (1, 3, 5, 7)
    assert plan.full_step(4) == StepPlan(4, plan.full_modes, (64,) * 8)
    assert plan.full_step(5) == StepPlan(5, plan.full_modes, (64,) * 8, read=False), (
        "the next one is full"
    )


def test_an_interval_of_one_caches_nothing() -> None:
    plan = make_plan(make_matches(), make_policy(N={"base": 1}))
    assert {mode for step in plan.steps for mode in step.modes} == {"compute"}
    assert set(kinds(plan)) == {"full"}
    assert plan.cached == plan.scored == ()


def test_a_module_that_never_has_a_fresh_token_is_reused() -> None:
    plan = make_plan(make_matches(), make_policy(R={"base": 0.5, "layer_weight": -1.0}))
    assert plan.steps[1].modes == ("reuse", "reuse", *("reuse", "partial") * 3)
    assert [plan.steps[1].fresh[i] for i in (1, 3, 5, 7)] == [0, 21, 42, 64]
    assert plan.scored == (3, 5, 7)


def test_no_token_on_some_steps_stays_partial() -> None:
    plan = make_plan(make_matches(), make_policy(R={"base": 0.5, "step_weight": -1.0}))
    assert {step.modes[1] for step in plan.steps if step.kind == "partial"} == {"partial"}
    assert [step.fresh[1] for step in plan.steps[1:3]] == [5, 10]


def test_scores_without_attention_need_none() -> None:
    plan = make_plan(make_matches(), make_policy(scores={"staleness": 1.0}))
    assert (plan.scored, plan.scored_by_attention) == ((1, 3, 5, 7), ())


def test_a_policy_for_other_steps() -> None:
    plan = make_plan(make_matches(), make_policy(N={"base": 3, "drift": 0.4}), 24)
    assert len(plan.steps) == 24
    assert full_indices(plan) == sorted(reference.full_steps(Interval(3, 0.4), range(24), 24))


def test_descending_steps() -> None:
    plan = make_plan(
        make_matches(),
        make_policy(
            sampler={"steps": 5, "order": "descending"}, R={"base": 0.5, "step_weight": 1.0}
        ),
    )
    assert [step.index for step in plan.steps] == [4, 3, 2, 1, 0]
    assert [step.fresh[1] for step in plan.steps] == [
        64,
        25,
        38,
        64,
        64,
    ]  # 32 (2 - 2 s/5), full at s = 4 and 1


def test_layers_count_per_list_of_blocks() -> None:
    long, short = make_matches(4).sites, make_matches(2, block="refiner").sites
    plan = make_plan(
        Matches((*long, *short), ()), make_policy(R={"base": 0.5, "layer_weight": 0.5})
    )
    fresh = dict(zip((site.path for site in plan.sites), plan.steps[1].fresh, strict=True))
    assert (
        (fresh["blocks.0.mlp"], fresh["blocks.3.mlp"])
        == (fresh["refiner.0.mlp"], fresh["refiner.1.mlp"])
        == (48, 16)
    )


@pytest.mark.parametrize(
    ("modes", "kind"),
    [
        (("full", "full"), "full"),
        (("full", "compute"), "full"),
        (("compute", "compute"), "full"),
        ((), "full"),
        (("reuse", "partial"), "partial"),
        (("compute", "partial"), "partial"),
        (("full", "reuse"), "mixed"),
        (("full", "partial", "compute"), "mixed"),
    ],
)
def test_kinds_of_steps(modes: tuple[str, ...], kind: str) -> None:
    assert StepPlan(0, modes, (0,) * len(modes)).kind == kind


@pytest.mark.parametrize(
    ("modes", "kind"),
    [
        (("full", "full", "full"), "full"),
        (("compute", "full"), "full"),
        (("reuse", "partial", "full"), "partial"),
        (("full", "partial", "full"), "mixed"),
        (("skip", "skip", "reuse"), "skip"),
        (("full", "skip", "reuse"), "skip"),
        (("reuse",), "skip"),
    ],
)
def test_a_memory_of_the_whole_model_makes_no_step_mixed(modes: tuple[str, ...], kind: str) -> None:
    assert StepPlan(0, modes, (0,) * len(modes), whole=1).kind == kind


def test_rules_in_order() -> None:
    rules: list[dict[str, Any]] = [
        {"match": "mlp", "R": {"base": 0.75}},
        {"match": "mlp", "layers": "2-3", "R": {"base": 0.25}},
        {"path": "blocks.3.*", "module": "reuse"},
        {"match": "self_attention", "layers": 1, "module": "compute"},
    ]
    step = make_plan(make_matches(), make_policy(rules=rules)).steps[1]
    assert step.fresh == (0, 16, 64, 16, 0, 48, 0, 0)
    assert step.modes == (
        "reuse",
        "partial",
        "compute",
        "partial",
        "reuse",
        "partial",
        "reuse",
        "reuse",
    )


@pytest.mark.parametrize(
    ("rule", "hint"),
    [
        (
            {"match": "cross_attention", "module": "compute"},
            "the model has no cross_attention, only mlp, self_attention",
        ),
        (
            {"path": "blocks.1.mpl", "module": "reuse"},
            "no path matches `blocks.1.mpl`; the nearest is `blocks.1.mlp`",
        ),
        ({"match": "mlp", "path": "*.attn", "module": "reuse"}, r"no path matches `\*.attn`"),
        ({"layers": "7-9", "module": "reuse"}, "those that match otherwise have layers 0 to 3"),
    ],
)
def test_a_rule_that_matches_nothing_names_the_nearest_miss(
    rule: dict[str, Any], hint: str
) -> None:
    with pytest.raises(
        PolicyError, match=f"the rule matches none of the 8 sites; {hint}"
    ) as raised:
        make_plan(make_matches(), make_policy(rules=[{"match": "mlp", "R": {"base": 0.8}}, rule]))
    (problem,) = raised.value.problems
    assert str(problem).startswith("rules[1]: ")


def test_a_rule_for_a_model_without_sites_tells_why_there_are_none() -> None:
    matches = Matches((), (NearMiss("mlp", "head.mlp", "it lies outside the numbered blocks"),))
    with pytest.raises(
        PolicyError,
        match=re.escape("the model has none (head.mlp: it lies outside the numbered blocks)"),
    ):
        make_plan(matches, make_policy(rules=[{"match": "mlp", "R": {"base": 0.8}}]))


@pytest.mark.parametrize(
    ("places", "of_20"), [([0, 0.5], [0, 10]), ({"of": 12, "at": [0, 6]}, [0, 6, 13])]
)
def test_places_hold_for_any_number_of_steps(places: object, of_20: list[int]) -> None:
    policy = make_policy(N={"full_steps": places})
    assert full_indices(make_plan(make_matches(), policy)) == [0, 6]
    assert full_indices(make_plan(make_matches(), policy, 20)) == of_20


@pytest.mark.parametrize("key", ["full_steps", "extra_full_steps"])
def test_listed_steps_hold_for_their_number_of_steps_only(key: str) -> None:
    policy = make_policy(N={key: [0, 5], **({"base": 3} if key == "extra_full_steps" else {})})
    assert 5 in full_indices(make_plan(make_matches(), policy, 12))
    with pytest.raises(
        PolicyError,
        match=r"lists full steps by index, which hold for its 12 steps only; this session has 20",
    ):
        make_plan(make_matches(), policy, 20)


@pytest.mark.parametrize(
    ("grain", "skip", "kept"),
    [
        ("module", "none", []),
        ("module", "all", ["state"]),
        ("block", "alternate", ["state"]),
        ("model", "none", ["state"]),
        ("output", "none", ["output"]),
        ("output", "all", ["output"]),
    ],
)
def test_what_is_kept_of_the_whole_model(grain: str, skip: str, kept: list[str]) -> None:
    found = make_matches(1)
    state, output = (Site(kind, "", 0, "", kind, kind, (2, 64, 8)) for kind in ("state", "output"))
    policy = make_policy(cache={"grain": grain}, skip=skip)
    cut = replace(found, states=(state,), outputs=(output,))
    plan = make_plan(cut, policy)
    assert [site.kind for site in plan.sites[2:]] == kept
    assert not [warning for warning in plan.warnings if "cut off" in warning]
    uncut = make_plan(replace(cut, states=(), uncut="because"), policy)
    assert [site.kind for site in uncut.sites[2:]] == ["output"] * len(kept)
    warned = [warning for warning in uncut.warnings if "cannot be cut off (because)" in warning]
    assert len(warned) == (kept == ["state"])
    nothing = make_plan(replace(found, uncut="because"), policy)
    assert len(nothing.sites) == 2
    assert not any(step.kind == "skip" for step in nothing.steps)


def test_listed_skips_hold_for_their_number_of_steps_only() -> None:
    policy = make_policy(skip=[1, 4])
    make_plan(make_matches(), policy)
    with pytest.raises(
        PolicyError,
        match=r"lists skipped steps by index, which hold for its 12 steps only; this session has 9",
    ):
        make_plan(make_matches(), policy, 9)


def test_planning_is_pure() -> None:
    matches, policy = make_matches(), make_policy()
    assert make_plan(matches, policy) == make_plan(matches, policy)
    assert hash(make_plan(matches, policy).steps) == hash(make_plan(matches, policy).steps)


@pytest.mark.parametrize(
    ("score", "what"),
    [("cross_attention", "cross-attention"), ("self_attention", "self- or joint attention")],
)
def test_scores_that_nothing_judges_by_count_as_zero_with_a_warning(score: str, what: str) -> None:
    sites = tuple(replace(site, influence=None, entropy=None) for site in make_matches().sites)
    scored = [site.path for site in sites if site.kind == "mlp"]
    (warning,) = make_plan(Matches(sites, ()), make_policy(scores={score: 1.0})).warnings
    assert warning.startswith(
        f"no {what} of the same block and tokens judges `{scored[0]}` "
        f"(and {len(scored) - 1} more sites): the score {score}"
    )
    assert (
        make_plan(
            Matches(sites, ()), make_policy(scores={score: 1.0}, modules={"mlp": "reuse"})
        ).warnings
        == ()
    )


SHARED = {"layout": "batched", "selection": "shared"}


def in_batches_of(*batches: int) -> Matches:
    sites = make_matches(layers=len(batches)).sites
    return Matches(
        tuple(replace(site, shape=(batches[site.layer], 64, 8)) for site in sites),
        (),
    )


def test_without_guidance_each_sample_selects_its_own_tokens() -> None:
    """An odd batch has no halves, and must not end a run in whose middle guidance is over."""
    plan = make_plan(in_batches_of(4, 3), make_policy(guidance=SHARED))
    assert not plan.settings.shared
    assert plan.warnings == (
        "guidance.selection is shared, but `blocks.1.mlp` has a batch of 3, which has no two "
        "halves: the model is called without guidance, and each sample selects its own tokens",
    )
    assert plan.steps == make_plan(in_batches_of(4, 4), make_policy(guidance=SHARED)).steps
    assert not any(plan.step(step.modes).shared for step in plan.steps)


def test_halves_share_a_selection() -> None:
    plan = make_plan(in_batches_of(4, 2), make_policy(guidance=SHARED))
    assert plan.settings.shared
    assert not plan.warnings


def test_an_odd_batch_that_selects_nothing_is_no_matter() -> None:
    reused = make_policy(guidance=SHARED, modules={"mlp": "reuse"})
    plan = make_plan(in_batches_of(3), reused)
    assert not plan.warnings


@pytest.mark.parametrize(
    ("aspect", "why"),
    [
        (None, r"no grid that is known: the model's latents are no image \[B, C, H, W\]"),
        ((16, 12), r"no grid: the latents of 16 x 12 have no so many patches"),
    ],
)
def test_a_spatial_bonus_needs_a_grid_that_is_known(
    aspect: tuple[int, int] | None, why: str
) -> None:
    """64 tokens may be 8 x 8, or 4 x 16, or a text."""
    remedy = r"by a rule, \{path: \"blocks\.0\.mlp\", spatial: \"off\"\}, or leave `spatial` out"
    with pytest.raises(PolicyError, match=rf"64 tokens of `blocks\.0\.mlp` form {why}; .*{remedy}"):
        make_plan(make_matches(), make_policy(spatial={"bonus": 0.4}), aspect=aspect)
    off = [{"path": "blocks.*.mlp", "spatial": "off"}]
    make_plan(make_matches(), make_policy(spatial={"bonus": 0.4}, rules=off), aspect=aspect)
