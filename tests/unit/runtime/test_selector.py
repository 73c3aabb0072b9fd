"""The spatial bonus against a loop; the order of equals; how staleness is counted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from tests.helpers import chosen_rows, make_policy
from tests.reference import bonus_by_hand
from toca_fx.kernels.influence import normalize
from toca_fx.kernels.ranking import ranked, spatial_bonus
from toca_fx.match.sites import Matches, Site
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.grids import token_grid
from toca_fx.plan.plan import Plan, StepPlan
from toca_fx.plan.planner import make_plan
from toca_fx.policy import Policy
from toca_fx.runtime.selector import Selector


@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (5, 7), (3, 3), (1, 9)])
@pytest.mark.parametrize("block", [2, 3, 4])
@pytest.mark.parametrize("levels", [3, 1000])  # few levels: many ties
@pytest.mark.parametrize("lowest", [1, -600, -4000])  # small values have scores below 0
def test_spatial_bonus_equals_a_loop_over_blocks(
    grid: tuple[int, int], block: int, levels: int, lowest: int
) -> None:
    generator = torch.Generator().manual_seed(block)
    shape = (2, 3, grid[0] * grid[1])
    score = torch.randint(lowest, lowest + levels, shape, generator=generator).double()
    found = spatial_bonus(score, grid, block, 0.4)
    for row, result in zip(score.flatten(0, 1).tolist(), found.flatten(0, 1).tolist(), strict=True):
        assert result == bonus_by_hand(row, grid, block, 0.4)


def test_spatial_bonus_of_a_tie_goes_to_the_first() -> None:
    score = torch.ones(1, 16)
    assert (spatial_bonus(score, (4, 4), 2, 1.0)[0] == 2).nonzero().flatten().tolist() == [
        0,
        2,
        8,
        10,
    ]


def test_spatial_bonus_lowers_the_best_of_a_block_below_zero() -> None:
    score = torch.tensor([[-1.0, -2.0, 3.0, 2.0, -3.0, -4.0, -1.0, -1.0]])  # 2 x 4: two blocks
    raised = spatial_bonus(score, (2, 4), 2, 0.8)
    assert raised.tolist() == [pytest.approx([-1.8, -2, 5.4, 2, -3, -4, -1, -1])]
    order = ranked(score, None, 0.0, False, ((2, 4), 2, 2.0))
    assert order.tolist() == [[2, 3, 6, 7, 1, 0, 4, 5]]


@pytest.mark.parametrize(
    ("tokens", "aspect", "expected"),
    [
        (64, (16, 16), (8, 8)),
        (64, (32, 8), (16, 4)),
        (64, None, None),
        (64, (16, 32), None),
        (36, (16, 32), None),
        (32, (16, 32), (4, 8)),
        (128, (16, 32), (8, 16)),
        (256, (16, 16), (16, 16)),
        (60, (16, 16), None),
        (49, (16, 16), None),
        (1, (5, 5), (1, 1)),
    ],
)
def test_token_grid(
    tokens: int, aspect: tuple[int, int] | None, expected: tuple[int, int] | None
) -> None:
    assert token_grid(tokens, aspect) == expected


def plan_for(
    policy: Policy,
    tokens: int = 8,
    batch: int = 2,
    layers: int = 1,
    aspect: tuple[int, int] | None = None,
) -> Plan:
    """Layers of one attention and one MLP each."""
    sites = []
    for layer, kind in itertools.product(range(layers), ("self_attention", "mlp")):
        sites.append(
            Site(
                kind,
                f"blocks.{layer}.{kind}",
                layer,
                "blocks",
                f"out{len(sites)}",
                f"in{len(sites)}",
                (batch, tokens, 4),
                2 * layer,
            )
        )
    return make_plan(Matches(tuple(sites), ()), policy, aspect=aspect)


def selector_for(
    plan: Plan,
    policy: Policy,
    scores: Sequence[Tensor],
    entropies: Mapping[int, Tensor] | None = None,
) -> Selector:
    """A selector over buffers in which the scored sites have ``scores``."""
    made = {Buffer("score", i): score for i, score in zip(plan.scored, scores, strict=True)}
    made |= {
        Buffer("picked", i): torch.zeros(plan.sites[i].shape[:2], dtype=torch.bool)
        for i in plan.scored
    }
    made |= {Buffer("entropy", i): entropy for i, entropy in (entropies or {}).items()}
    return Selector(plan, made)


def choose(selector: Selector, step: StepPlan) -> dict[int, Tensor]:
    """The rows of each partial site, as they are given to a step, which then has run."""
    given = selector.select(step)
    selector.advance()
    return {
        site: rows for site, rows in chosen_rows(given).items() if step.modes[site] == "partial"
    }


def run_partial_steps(
    plan: Plan, selector: Selector, site: int = 1
) -> list[list[list[int]] | None]:
    """Tokens of ``site`` per step and sample; None for full steps."""
    chosen: list[list[list[int]] | None] = []
    for step in plan.steps:
        if step.kind == "full":
            selector.full()
            chosen.append(None)
        else:
            chosen.append((choose(selector, step)[site] % plan.sites[site].tokens).tolist())
    return chosen


def test_equal_scores_go_to_the_lower_index_and_staleness_goes_round() -> None:
    policy = make_policy(
        scores={"staleness": 1.0}, R={"base": 0.625}, N={"base": 5}, sampler={"steps": 10}
    )
    plan = plan_for(policy)  # K = 3 of 8
    chosen = run_partial_steps(plan, selector_for(plan, policy, [torch.zeros(2, 8)]))
    # After each round the untouched tokens are the stalest; ties by index; the full step starts
    # over.
    round_robin = [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]]
    assert chosen == [None, *([tokens, tokens] for tokens in round_robin)] * 2


def test_many_equal_scores_stay_in_order() -> None:
    policy = make_policy(R={"base": 0.0})
    plan = plan_for(policy, tokens=4096, batch=1)
    (step, *_) = [step for step in plan.steps if step.kind == "partial"]
    selected = choose(selector_for(plan, policy, [torch.zeros(1, 4096)]), step)[1]
    assert torch.equal(selected, torch.arange(4096)[None])


def test_counters_against_a_count_by_hand() -> None:
    torch.manual_seed(0)
    policy = make_policy(
        scores={"staleness": 0.25}, R={"base": 0.7}, N={"base": 7}, sampler={"steps": 21}
    )
    plan = plan_for(policy, tokens=16, batch=3)
    base = torch.rand(3, 16)
    before = base.clone()
    chosen = run_partial_steps(plan, selector_for(plan, policy, [base]))
    assert torch.equal(base, before), "the base scores are read, never written"
    missed = [[0] * 16 for _ in range(3)]
    for tokens in chosen:
        if tokens is None:
            missed = [[0] * 16 for _ in range(3)]
            continue
        for sample in range(3):
            score = base[sample] + torch.tensor(missed[sample]) * torch.tensor(0.25 / 7)
            expected = sorted(range(16), key=lambda token: (-score[token].item(), token))[:4]
            assert tokens[sample] == expected
            missed[sample] = [
                0 if token in expected else count + 1 for token, count in enumerate(missed[sample])
            ]


def test_rows_index_the_flattened_batch() -> None:
    policy = make_policy()
    plan = plan_for(policy, tokens=8, batch=3)
    step = next(step for step in plan.steps if step.kind == "partial")
    base = torch.stack(
        [torch.arange(8.0), -torch.arange(8.0), torch.tensor([0.0, 9, 0, 9, 0, 9, 0, 9])]
    )
    rows = choose(selector_for(plan, policy, [base]), step)[1]
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[7, 6, 5, 4], [8, 9, 10, 11], [17, 19, 21, 23]]


def test_a_site_that_is_full_on_a_mixed_step_starts_counting_anew() -> None:
    policy = make_policy(
        scores={"staleness": 1.0},
        R={"base": 0.75},
        N={"base": 6},
        rules=[{"match": "mlp", "layers": 0, "N": {"extra_full_steps": [2]}}],
    )
    plan = plan_for(policy, layers=2)
    assert [step.kind for step in plan.steps[:4]] == ["full", "partial", "mixed", "partial"]
    selector = selector_for(plan, policy, [torch.zeros(2, 8)] * 2)
    selector.full()
    first, mixed, after = (choose(selector, step) for step in plan.steps[1:4])
    tokens = {
        name: {site: (rows[0] % 8).tolist() for site, rows in step.items()}
        for name, step in zip("abc", (first, mixed, after), strict=True)
    }
    assert tokens == {"a": {1: [0, 1], 3: [0, 1]}, "b": {3: [2, 3]}, "c": {1: [0, 1], 3: [4, 5]}}


def test_no_token_is_an_empty_choice() -> None:
    policy = make_policy(R={"base": 0.9, "layer_weight": -1.0})
    plan = plan_for(
        policy, tokens=8, layers=2
    )  # K = 0 in the first layer, trunc(0.2 * 8) in the last
    step = next(step for step in plan.steps if step.kind == "partial")
    scores = [torch.rand(2, 8)] * len(plan.scored)
    chosen = choose(selector_for(plan, policy, scores), step)
    assert {site: tuple(rows.shape) for site, rows in chosen.items()} == {3: (2, 1)}
    policy = make_policy(R={"base": 0.5, "step_weight": -1.0})
    plan = plan_for(policy, tokens=8)
    rows = choose(selector_for(plan, policy, [torch.rand(2, 8)]), plan.steps[1])[1]
    assert tuple(rows.shape) == (2, 0)


def test_a_shared_selection_is_that_of_the_mean_and_the_same_in_both_halves() -> None:
    torch.manual_seed(0)
    policy = make_policy(
        guidance={"layout": "batched", "selection": "shared"}, spatial={"bonus": 0.5, "grid": 2}
    )
    plan = plan_for(policy, tokens=16, batch=4, aspect=(8, 8))
    step = next(step for step in plan.steps if step.kind == "partial")
    base = torch.rand(4, 16)
    tokens = (choose(selector_for(plan, policy, [base]), step)[1] % 16).tolist()
    for sample in range(2):
        mean = ((base[sample] + base[sample + 2]) / 2).tolist()
        raised = bonus_by_hand(mean, (4, 4), 2, 0.5)
        assert (
            tokens[sample]
            == tokens[sample + 2]
            == sorted(range(16), key=lambda token: -raised[token])[:8]
        )
    assert tokens[0] != tokens[1]


def test_random_scores_give_a_sample_the_same_tokens_in_any_batch() -> None:
    policy = make_policy(scores={"random": 1.0}, R={"base": 0.5})
    chosen = []
    for batch in (1, 3):
        plan = plan_for(policy, tokens=32, batch=batch)
        step = next(step for step in plan.steps if step.kind == "partial")
        chosen.append(
            choose(selector_for(plan, policy, [torch.zeros(batch, 32)]), step)[1][0].tolist()
        )
    assert chosen[0] == chosen[1]
    assert chosen[0] != sorted(chosen[0])


def test_bytes_of_the_counters() -> None:
    policy = make_policy()
    plan = plan_for(policy, tokens=16, batch=2, layers=3)
    assert selector_for(plan, policy, [torch.zeros(2, 16)] * 3).nbytes() == 3 * 2 * 16 * 4


@pytest.mark.parametrize("shared", [False, True])
def test_entropy_joins_the_score_by_hand(shared: bool) -> None:
    torch.manual_seed(0)
    known, entropy = torch.rand(4, 16, dtype=torch.float64), torch.rand(4, 16, dtype=torch.float64)
    spatial = ((4, 4), 2, 0.5)
    found = ranked(known, entropy, 0.7, shared, spatial).tolist()
    for sample in range(4):
        other = (sample + 2) % 4
        base = (known[sample] + known[other]) / 2 if shared else known[sample]
        disorder = entropy[sample] + entropy[other] if shared else entropy[sample]
        score = base + 0.7 * normalize(1 + disorder)
        raised = bonus_by_hand(score.tolist(), (4, 4), 2, 0.5)
        assert found[sample] == sorted(range(16), key=lambda token: -raised[token])


def test_a_sample_selects_by_its_cross_attention_as_of_its_last_run() -> None:
    policy = make_policy(scores={"cross_attention": 1.0}, R={"base": 0.5})
    kinds = ("cross_attention", "mlp")
    sites = tuple(
        Site(kind, f"blocks.0.{kind}", 0, "blocks", f"out{i}", f"in{i}", (1, 8, 4), entropy=0)
        for i, kind in enumerate(kinds)
    )
    plan = make_plan(
        Matches(sites, ()),
        make_policy(scores={"cross_attention": 1.0}, modules={"cross_attention": "reuse"}),
    )
    step = next(step for step in plan.steps if step.kind == "partial")
    assert plan.inside(step.modes) == ()
    selector = selector_for(
        plan, policy, [torch.zeros(1, 8)], entropies={0: torch.arange(8.0)[None]}
    )
    assert choose(selector, step)[1].tolist() == [[7, 6, 5, 4]]
