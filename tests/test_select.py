"""The spatial bonus against a loop; the order of equals; how staleness is counted."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.helpers import make_policy
from tests.reference import bonus_by_hand
from toca_fx import PolicyError
from toca_fx.match import Matches, Site
from toca_fx.plan import Plan, make_plan
from toca_fx.policy.types import Policy
from toca_fx.select import Selector, spatial_bonus, token_grid


@pytest.mark.parametrize("grid", [(8, 8), (4, 6), (5, 7), (3, 3), (1, 9)])
@pytest.mark.parametrize("block", [2, 3, 4])
@pytest.mark.parametrize("levels", [3, 1000])  # few levels: many ties
def test_spatial_bonus_equals_a_loop_over_blocks(grid: tuple[int, int], block: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(block)
    score = torch.randint(1, levels + 1, (2, 3, grid[0] * grid[1]), generator=generator).double()
    found = spatial_bonus(score, grid, block, 0.4)
    for row, result in zip(score.flatten(0, 1).tolist(), found.flatten(0, 1).tolist(), strict=True):
        assert result == bonus_by_hand(row, grid, block, 0.4)


def test_spatial_bonus_of_a_tie_goes_to_the_first() -> None:
    score = torch.ones(1, 16)
    assert (spatial_bonus(score, (4, 4), 2, 1.0)[0] == 2).nonzero().flatten().tolist() == [0, 2, 8, 10]


@pytest.mark.parametrize(
    ("tokens", "aspect", "expected"),
    [
        (64, (16, 16), (8, 8)),
        (64, (32, 8), (16, 4)),
        (64, None, (8, 8)),
        (256, (16, 16), (16, 16)),
        (60, (16, 16), None),
        (49, (16, 16), (7, 7)),
        (1, (5, 5), (1, 1)),
    ],
)
def test_token_grid(tokens: int, aspect: tuple[int, int] | None, expected: tuple[int, int] | None) -> None:
    assert token_grid(tokens, aspect) == expected


def plan_for(policy: Policy, tokens: int = 8, batch: int = 2, layers: int = 1) -> Plan:
    """Layers of one attention and one MLP each."""
    sites = []
    for layer, kind in itertools.product(range(layers), ("self_attention", "mlp")):
        sites.append(
            Site(kind, f"blocks.{layer}.{kind}", layer, "blocks", f"out{len(sites)}", f"in{len(sites)}", (batch, tokens, 4), 2 * layer)
        )
    return make_plan(Matches(tuple(sites), ()), policy)


def run_partial_steps(plan: Plan, selector: Selector, site: int = 1) -> list[list[list[int]] | None]:
    """Tokens of ``site`` per step and sample; None for full steps."""
    chosen: list[list[list[int]] | None] = []
    for step in plan.steps:
        if step.kind == "full":
            selector.full()
            chosen.append(None)
        else:
            chosen.append((selector.select(step)[site] % plan.sites[site].tokens).tolist())
    return chosen


def test_equal_scores_go_to_the_lower_index_and_staleness_goes_round() -> None:
    policy = make_policy(scores={"staleness": 1.0}, R={"base": 0.625}, N={"base": 5}, sampler={"steps": 10})
    plan = plan_for(policy)  # K = 3 of 8
    chosen = run_partial_steps(plan, Selector(plan, policy, [torch.zeros(2, 8)], None))
    # After each round the untouched tokens are the stalest; ties by index; the full step starts over.
    round_robin = [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]]
    assert chosen == [None, *([tokens, tokens] for tokens in round_robin)] * 2


def test_many_equal_scores_stay_in_order() -> None:
    policy = make_policy(R={"base": 0.0})
    plan = plan_for(policy, tokens=4096, batch=1)
    (step, *_) = [step for step in plan.steps if step.kind == "partial"]
    selected = Selector(plan, policy, [torch.zeros(1, 4096)], None).select(step)[1]
    assert torch.equal(selected, torch.arange(4096)[None])


def test_counters_against_a_count_by_hand() -> None:
    torch.manual_seed(0)
    policy = make_policy(scores={"staleness": 0.25}, R={"base": 0.7}, N={"base": 7}, sampler={"steps": 21})
    plan = plan_for(policy, tokens=16, batch=3)
    base = torch.rand(3, 16)
    before = base.clone()
    chosen = run_partial_steps(plan, Selector(plan, policy, [base], None))
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
            missed[sample] = [0 if token in expected else count + 1 for token, count in enumerate(missed[sample])]


def test_rows_index_the_flattened_batch() -> None:
    policy = make_policy()
    plan = plan_for(policy, tokens=8, batch=3)
    step = next(step for step in plan.steps if step.kind == "partial")
    base = torch.stack([torch.arange(8.0), -torch.arange(8.0), torch.tensor([0.0, 9, 0, 9, 0, 9, 0, 9])])
    rows = Selector(plan, policy, [base], None).select(step)[1]
    assert rows.dtype == torch.int64
    assert rows.is_contiguous()
    assert rows.tolist() == [[7, 6, 5, 4], [8, 9, 10, 11], [17, 19, 21, 23]]


def test_a_site_that_is_full_on_a_mixed_step_starts_counting_anew() -> None:
    policy = make_policy(
        scores={"staleness": 1.0}, R={"base": 0.75}, N={"base": 6}, rules=[{"match": "mlp", "layers": 0, "N": {"extra_full_steps": [2]}}]
    )
    plan = plan_for(policy, layers=2)
    assert [step.kind for step in plan.steps[:4]] == ["full", "partial", "mixed", "partial"]
    selector = Selector(plan, policy, [torch.zeros(2, 8)] * 2, None)
    selector.full()
    first, mixed, after = (selector.select(step) for step in plan.steps[1:4])
    tokens = {
        name: {site: (rows[0] % 8).tolist() for site, rows in step.items()} for name, step in zip("abc", (first, mixed, after), strict=True)
    }
    assert tokens == {"a": {1: [0, 1], 3: [0, 1]}, "b": {3: [2, 3]}, "c": {1: [0, 1], 3: [4, 5]}}


def test_no_token_is_an_empty_choice() -> None:
    policy = make_policy(R={"base": 0.9, "layer_weight": -1.0})
    plan = plan_for(policy, tokens=8, layers=2)  # K = 0 in the first layer, trunc(0.2 * 8) in the last
    step = next(step for step in plan.steps if step.kind == "partial")
    scores = [torch.rand(2, 8)] * len(plan.scored)
    chosen = Selector(plan, policy, scores, None).select(step)
    assert {site: tuple(rows.shape) for site, rows in chosen.items()} == {3: (2, 1)}
    policy = make_policy(R={"base": 0.5, "step_weight": -1.0})
    plan = plan_for(policy, tokens=8)
    rows = Selector(plan, policy, [torch.rand(2, 8)], None).select(plan.steps[1])[1]
    assert tuple(rows.shape) == (2, 0)


def test_a_shared_selection_is_that_of_the_mean_and_the_same_in_both_halves() -> None:
    torch.manual_seed(0)
    policy = make_policy(guidance={"layout": "batched", "selection": "shared"}, spatial={"bonus": 0.5, "grid": 2})
    plan = plan_for(policy, tokens=16, batch=4)
    step = next(step for step in plan.steps if step.kind == "partial")
    base = torch.rand(4, 16)
    tokens = (Selector(plan, policy, [base], None).select(step)[1] % 16).tolist()
    for sample in range(2):
        mean = ((base[sample] + base[sample + 2]) / 2).tolist()
        raised = bonus_by_hand(mean, (4, 4), 2, 0.5)
        assert tokens[sample] == tokens[sample + 2] == sorted(range(16), key=lambda token: -raised[token])[:8]
    assert tokens[0] != tokens[1]


def test_random_scores_give_a_sample_the_same_tokens_in_any_batch() -> None:
    policy = make_policy(scores={"random": 1.0}, R={"base": 0.5})
    chosen = []
    for batch in (1, 3):
        plan = plan_for(policy, tokens=32, batch=batch)
        step = next(step for step in plan.steps if step.kind == "partial")
        chosen.append(Selector(plan, policy, [torch.zeros(batch, 32)], None).select(step)[1][0].tolist())
    assert chosen[0] == chosen[1]
    assert chosen[0] != sorted(chosen[0])


def test_bytes_of_the_counters() -> None:
    policy = make_policy()
    plan = plan_for(policy, tokens=16, batch=2, layers=3)
    assert Selector(plan, policy, [torch.zeros(2, 16)] * 3, None).nbytes() == 3 * 2 * 16 * 4


def test_tokens_that_form_no_grid_have_no_spatial_bonus() -> None:
    policy = make_policy(spatial={"bonus": 0.4})
    with pytest.raises(PolicyError, match=r"the 12 tokens of `blocks\.0\.mlp` form no grid; switch the bonus off for it by a rule"):
        Selector(plan_for(policy, tokens=12), policy, [torch.rand(2, 12)], (16, 16))
    policy = make_policy(spatial={"bonus": 0.4}, rules=[{"match": "mlp", "spatial": "off"}])
    Selector(plan_for(policy, tokens=12), policy, [torch.rand(2, 12)], (16, 16))
