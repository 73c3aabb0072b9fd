"""Code that an operator wraps is captured as if it were not wrapped: values, sites and paths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.helpers import capture
from tests.models import Attention, Mlp, randomize
from toca_fx.capture.aten import to_aten
from toca_fx.capture.inline import inlined
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.match.matcher import match

Run = Callable[..., Tensor]


class Block(nn.Module):
    """Attention and MLP, each run by ``run``."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.attn, self.mlp, self.run = Attention(16, 2), Mlp(16, 32), run

    def feed(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.mlp(x) * (1 if scale is None else scale)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.run(self.attn, x)
        return x + self.run(self.feed, x, scale=t)


class Model(nn.Module):
    """Two blocks, one after the other, ``times`` times."""

    def __init__(self, block: Run, inner: Run, times: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(inner) for _ in range(2)])
        self.run, self.times = block, times

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in list(self.blocks) * self.times:
            x = self.run(block, x, t)
        return x


def plain(function: Run, *args: Tensor, **kwargs: Tensor) -> Tensor:
    return function(*args, **kwargs)


@torch.compiler.nested_compile_region
def region(function: Run, *args: Tensor, **kwargs: Tensor) -> Tensor:
    return function(*args, **kwargs)


def in_two(function: Run, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """A wrapper around several outputs, not all of which are read."""
    return checkpoint(lambda: (args[0], function(*args, **kwargs)), use_reentrant=False)[1]


some = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
once = partial(checkpoint, use_reentrant=False)

WRAPPED: dict[str, tuple[Run, Run]] = {
    "blocks": (once, plain),
    "what is in blocks": (plain, once),
    "one in the other": (once, once),
    "reentrant": (partial(checkpoint, use_reentrant=True), plain),
    "selective": (partial(checkpoint, use_reentrant=False, context_fn=some), plain),
    "several outputs": (in_two, in_two),
    "compiled once": (region, plain),
    "what is in blocks compiled once": (plain, region),
    "compiled once in a checkpoint": (once, region),
}


def found(graph: fx.GraphModule) -> list[tuple[str, str, int | None]]:
    """Kind and path of each site, and the attention that tells about it."""
    return [(site.kind, site.path, site.influence) for site in match(graph.graph).sites]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_code_is_as_if_it_were_not_wrapped(name: str, times: int) -> None:
    model = randomize(Model(*WRAPPED[name], times), seed=0).double()
    twin = Model(plain, plain, times).double().eval()
    twin.load_state_dict(model.state_dict())
    given = torch.randn(2, 8, 16, dtype=torch.float64), torch.rand(2, 1, 1, dtype=torch.float64)
    captured, inputs = capture(model, *given)
    graph = to_aten(captured, inputs)
    assert found(graph) == found(to_aten(*capture(twin, *given)))
    assert len(found(graph)) == len({path for _, path, _ in found(graph)}) == 4 * times
    (output,) = graph(*inputs)
    assert torch.equal(output, model(*given))


def test_a_graph_without_wrapped_code_is_left_as_it_is() -> None:
    captured, _ = capture(Model(plain, plain), torch.randn(2, 8, 16), torch.rand(2, 1, 1))
    assert inlined(captured) is captured


def test_other_operators_with_code_are_refused_by_the_users_line() -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def more(at: Tensor, x: Tensor) -> Tensor:
                return at < 3

            def twice(at: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
                return at + 1, x * 2

            return torch.while_loop(more, twice, (torch.tensor(0), x))[1]

    captured, inputs = capture(Loop(), torch.randn(2, 8))
    with pytest.raises(UnsupportedModelError, match=r"while_loop at .*test_inline\.py:[0-9]+ \("):
        to_aten(captured, inputs)
