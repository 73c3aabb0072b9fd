"""Every score that a policy can weigh has one formula, of the kind that its declaration says."""

from __future__ import annotations

import pytest
import torch

from toca_fx.kernels.scores import AHEAD, DRAWS, OF_ATTENTION, Ahead
from toca_fx.policy import scores_of

BATCH, HEADS, TOKENS, WIDTH = 2, 3, 5, 4


def test_declarations_and_formulas_name_the_same_scores() -> None:
    known = {name: score.known for name, score in scores_of().items()}
    assert set(OF_ATTENTION) == {name for name, when in known.items() if when != "ahead"}
    assert set(AHEAD) == {name for name, when in known.items() if when == "ahead"}
    assert set(AHEAD) >= DRAWS
    assert all((score.source is None) == (name in AHEAD) for name, score in scores_of().items())


@pytest.mark.parametrize("name", OF_ATTENTION)
def test_a_formula_makes_one_score_of_each_token(name: str) -> None:
    score = OF_ATTENTION[name]
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, HEADS, TOKENS, WIDTH)
    operands = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in score.reads]
    options = {"every": 1, "share": 1.0}
    given = {option: options[option] for option in score.options}
    scale = [WIDTH**-0.5] if score.scaled else []
    found = score.formula(*operands, *scale, **given)
    assert found.shape == (BATCH, TOKENS)
    if score.attention is not None:
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        output, with_it = score.attention(*operands, value, **given)
        attention = torch.nn.functional.scaled_dot_product_attention(*operands, value)
        torch.testing.assert_close(output, attention)
        torch.testing.assert_close(with_it, found)
    if score.of_map is not None:
        query, key = operands
        weights = (query @ key.transpose(-1, -2) * WIDTH**-0.5).softmax(-1)
        torch.testing.assert_close(score.of_map(weights, **given), found)


@pytest.mark.parametrize("name", AHEAD)
def test_a_formula_ahead_of_a_step_serves_all_sites_at_once(name: str) -> None:
    stale = torch.arange(12.0).reshape(2, 2, 3)
    known = Ahead(stale, torch.Generator().manual_seed(0))
    found = AHEAD[name](known)
    assert torch.broadcast_shapes(found.shape, stale.shape) == stale.shape
    again = AHEAD[name](Ahead(stale, torch.Generator().manual_seed(0)))
    assert torch.equal(found, again)
    assert torch.equal(found, AHEAD[name](known)) == (name not in DRAWS)
