"""The model's state in front of its output layers, and what it returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.helpers import KINDS, capture, capture_tiny
from toca_fx.capture.aten import to_aten
from toca_fx.graph.network import needed
from toca_fx.match.matcher import match
from toca_fx.match.sites import Matches

WIDTH = 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1)))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))


class Block(nn.Module):
    """x + part(norm(x)), for each of ``parts``."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts, self.norm = nn.ModuleList(parts), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(self.norm(x))
        return x


class Model(nn.Module):
    """Blocks, and output layers that are modulated by a timestep; the first tokens are a text."""

    def __init__(
        self, *blocks: nn.Module, text: int = 0, embedder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.blocks, self.text = nn.ModuleList(blocks), text
        self.embed, self.embedder = nn.Linear(1, WIDTH), embedder or nn.Identity()
        self.norm, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = self.embedder(self.embed(t[:, None, None]))
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x[:, self.text :]) * scale)


def found_in(model: nn.Module, *inputs: Tensor) -> tuple[Matches, fx.Graph]:
    given = inputs or (torch.randn(2, 8, WIDTH), torch.tensor([0.5, 0.5]))
    captured, flat = capture(model.eval().requires_grad_(False), *given)
    graph = to_aten(captured, flat).graph
    return match(graph), graph


def left_over(found: Matches, graph: fx.Graph) -> set[Any]:
    """The operators that outputs need besides the states."""
    (end,) = graph.find_nodes(op="output")
    names = needed(graph, [end.name], given={state.output for state in found.states})
    return {
        node.target
        for node in graph.nodes
        if node.name in names and "blocks" in node.meta.get("path", "")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_the_end_of_the_last_block(kind: str) -> None:
    graph = capture_tiny(kind, layers=2)[0].graph
    found = match(graph)
    (state,) = found.states
    assert (state.kind, state.path, state.shape) == ("state", "", (2, 64, 32))
    assert state.output == found.sites[-1].residual
    (output,) = found.outputs
    (end,) = graph.find_nodes(op="output")
    assert (output.kind, output.output) == ("output", end.all_input_nodes[0].name)
    assert output.shape == (2, 8 * 16, 16), "all axes but the first and the last"
    assert not found.uncut


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_block_is_all_of_its_sites(kind: str) -> None:
    found = match(capture_tiny(kind, layers=2)[0].graph)
    sites = [site for site in found.sites if site.layer == 0]
    assert len(sites) == 2
    assert found.first_block == (sites[0].stream, sites[-1].residual)


def test_the_first_block_of_the_latents_may_come_behind_others() -> None:
    """Those of the timestep, say; and it may have the text's tokens in it."""
    embedder = nn.Sequential(Block(Mlp()))
    found, _ = found_in(Model(Block(Attention(), Mlp()), text=3, embedder=embedder))
    assert [site.block for site in found.sites] == ["embedder", "blocks", "blocks"]
    assert found.first_block == (found.sites[1].stream, found.sites[2].residual)
    assert found_in(nn.Linear(WIDTH, WIDTH), torch.randn(2, 8, WIDTH))[0].first_block == ()


def test_what_nothing_reads_of_a_state_is_not_kept() -> None:
    found, graph = found_in(Model(Block(Attention()), text=3))
    (state,) = found.states
    assert state.shape == (2, 5, WIDTH)
    nodes = {node.name: node for node in graph.nodes}
    assert nodes[state.output].target is torch.ops.aten.slice.Tensor


def test_a_block_may_end_in_something_that_is_no_site() -> None:
    """The convolutions of Sana, say: the state is behind them."""
    found, graph = found_in(Model(Block(Attention(), nn.Linear(WIDTH, WIDTH))))
    assert [site.kind for site in found.sites] == ["self_attention"]
    (state,) = found.states
    assert state.output != found.sites[0].residual
    assert not left_over(found, graph)


def test_one_module_may_add_to_two_streams() -> None:
    class Both(nn.Module):
        """Attention over two streams in a row; each has a gate of its own (FLUX.3)."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()
            self.gates = nn.Parameter(torch.randn(2, WIDTH))

        def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            joined = self.attention(torch.cat([one, other], dim=1))
            parts = joined.split([one.shape[1], other.shape[1]], dim=1)
            return one + self.gates[0] * parts[0], other + self.gates[1] * parts[1]

    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Both(), Both()])
            self.text, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            y = self.text(y)
            for block in self.blocks:
                y, x = block(y, x)
            return self.proj(x)

    found, graph = found_in(Streams(), torch.randn(2, 8, WIDTH), torch.randn(2, 3, WIDTH))
    (state,) = found.states
    assert state.shape == (2, 8, WIDTH)
    assert not left_over(found, graph)


def test_several_streams_have_a_state_each() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(Attention()), Block(Mlp())])

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.blocks[0](x).relu(), self.blocks[1](x * 2).relu()

    found, _ = found_in(Two(), torch.randn(2, 8, WIDTH))
    assert [state.output for state in found.states] == [site.residual for site in found.sites]
    assert len(found.outputs) == 2


def test_blocks_that_embed_a_timestep_are_computed() -> None:
    """Their stream does not depend on the latents (the guidance of Chroma)."""
    found, graph = found_in(Model(Block(Mlp()), embedder=nn.Sequential(Block(Mlp()), Block(Mlp()))))
    assert len(found.sites) == 3
    (state,) = found.states
    assert state.shape == (2, 8, WIDTH)
    assert not left_over(found, graph)


def test_without_any_site_there_may_be_a_state() -> None:
    found, _ = found_in(Model(Block(nn.Linear(WIDTH, WIDTH))))
    assert not found.sites
    assert len(found.states) == 1


@pytest.mark.parametrize(
    ("model", "inputs", "why"),
    [
        (
            nn.Linear(WIDTH, WIDTH),
            (torch.randn(2, 8, WIDTH),),
            "the outputs read no residual stream of blocks",
        ),
        (
            nn.Embedding(5, WIDTH),
            (torch.zeros(2, 8, dtype=torch.int64),),
            "the outputs read no input that is recognised as latents",
        ),
    ],
)
def test_why_there_is_none(model: nn.Module, inputs: tuple[Tensor, ...], why: str) -> None:
    found, _ = found_in(model, *inputs)
    assert found.states == ()
    assert found.uncut == why
