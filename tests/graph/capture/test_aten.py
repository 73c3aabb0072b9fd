"""Dynamo's graph as pre-dispatch ATen: the same numbers, names of modules and inputs, and a check
where the model writes in place.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import capture, make_policy
from toca_fx.backend import dispatcher
from toca_fx.capture.aten import to_aten, verify
from toca_fx.capture.sources import clean_path
from toca_fx.diagnostics import UnsupportedModelError

aten = torch.ops.aten


class Model(nn.Module):
    """A linear layer and what ``finish`` does to its output."""

    def __init__(self, finish: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.finish = nn.Linear(8, 8), finish

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.layer(x))


def half_in_place(y: Tensor) -> Tensor:
    y[:, :4] *= 2
    return y


@pytest.mark.parametrize(
    ("finish", "verified"), [(half_in_place, 1), (torch.relu, 0)], ids=["writes", "computes"]
)
def test_models_that_write_in_place_are_verified(
    finish: Callable[[Tensor], Tensor], verified: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    monkeypatch.setattr(dispatcher, "verify", lambda *given: runs.append(verify(*given)))
    with torch.no_grad():
        toca_fx.compile(Model(finish), make_policy(), inner="eager")(torch.randn(2, 8))
    assert len(runs) == verified


def test_a_write_that_got_lost_is_told() -> None:
    captured, inputs = capture(Model(half_in_place), torch.randn(2, 8))
    module = to_aten(captured, inputs)
    verify(captured, module, inputs)
    (written,) = module.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    written.replace_all_uses_with(written.args[0])
    module.recompile()
    with pytest.raises(
        UnsupportedModelError, match="the canonical graph differs from the captured one by"
    ):
        verify(captured, module, inputs)


def test_verifying_takes_no_random_numbers_from_the_caller() -> None:
    captured, inputs = capture(Model(lambda y: y + torch.randn(8)), torch.randn(2, 8))
    module = to_aten(captured, inputs)
    before = torch.get_rng_state()
    verify(captured, module, inputs)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "source",
    [
        "L['self']._modules['blocks']._modules['0']._modules['attn']",
        "L['self'].__dict__['_modules']['blocks'].0.attn",
        "L['self']._orig_mod._modules['blocks'].0.attn",
    ],
)
def test_module_paths_are_as_named_modules_has_them(source: str) -> None:
    assert clean_path(source) == "blocks.0.attn"
