"""Tokens beside forecasts, on a tiny model: what is fresh is right, what is kept is as said."""

from __future__ import annotations

import pytest
import torch

from tests.marks import slow_but
from tests.tiny_digits import tiny_digits
from tools.frontier.setups import STEPS, Setup
from tools.frontier.tried_tokens import CLUSTERS, History, Scheme, Tokens, sampled, schemes

EVERY_FIFTH = tuple(range(0, STEPS, 5))


@pytest.fixture(scope="module")
def setup() -> Setup:
    return tiny_digits(blocks=2)


@pytest.fixture(scope="module")
def plain(setup: Setup) -> tuple[torch.Tensor, int]:
    """The images of the model itself, and their FLOPs."""
    return sampled(setup, setup.model)


# Of each grain, way to choose and way to keep one, alone or with another.
OFTEN = (
    Scheme("model"),
    Scheme("module"),
    Scheme("module", 0.1, "random", "overwrite"),
    Scheme("module", 0.1, "surprise", "renew"),
    Scheme("module", CLUSTERS / 256, "cluster", "overwrite", "error"),
    Scheme("model", 0.1, "surprise", "append"),
    Scheme("model", CLUSTERS / 256, "cluster", "nothing", "error"),
)


@pytest.mark.parametrize(
    "scheme", slow_but(OFTEN, schemes(), "one of each kind is enough"), ids=str
)
def test_full_steps_are_the_models(
    setup: Setup, plain: tuple[torch.Tensor, int], scheme: Scheme
) -> None:
    images, _ = sampled(setup, Tokens(setup.model, range(STEPS), 1, scheme))
    torch.testing.assert_close(images, plain[0], rtol=0, atol=1e-4)


def test_all_tokens_through_all_blocks_are_the_model(
    setup: Setup, plain: tuple[torch.Tensor, int]
) -> None:
    expected, uncached = plain
    for keep in ("nothing", "append"):
        scheme = Scheme("model", 1.0, "random", keep)  # type: ignore[arg-type]
        images, _ = sampled(setup, Tokens(setup.model, EVERY_FIFTH, 1, scheme))
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    skipped, flops = sampled(setup, Tokens(setup.model, EVERY_FIFTH, 1, Scheme("model")))
    assert not torch.allclose(skipped, expected, atol=1e-4)
    assert flops < uncached / 3


def test_tokens_cost_and_change_something(setup: Setup) -> None:
    for grain in ("module", "model"):
        bare, least = sampled(setup, Tokens(setup.model, EVERY_FIFTH, 1, Scheme(grain)))
        scheme = Scheme(grain, 0.25, "surprise", "overwrite")
        images, flops = sampled(setup, Tokens(setup.model, EVERY_FIFTH, 1, scheme))
        assert flops > least
        assert not torch.equal(images, bare)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_each_token_has_the_polynomial_through_its_own_values(order: int) -> None:
    slope = torch.randn(2, 6, 3)
    history = History(order)
    for at in (0, 2, 5):
        history.add(slope * at**order, at)
    rows = torch.tensor([[1, 4], [0, 5]])
    history.renew(rows, (slope * 6**order).gather(1, rows[..., None].expand(2, 2, 3)), 6, "append")
    torch.testing.assert_close(history.forecast(8), slope * 8**order, rtol=1e-4, atol=1e-4)
    assert history.times[0].tolist() == [[5, 6, 5, 5, 6, 5], [6, 5, 5, 5, 5, 6]]


def test_what_is_kept_of_a_fresh_token() -> None:
    rows, fresh = torch.tensor([[1]]), torch.ones(1, 1, 1)
    for keep, time in (("overwrite", 0.0), ("renew", 3.0)):
        history = History(1)
        history.add(torch.zeros(1, 2, 1), 0)
        history.renew(rows, fresh, 3, keep)
        assert history.values[0].flatten().tolist() == [0, 1]
        assert history.times[0].tolist() == [[0, time]]
