"""What is cut out of the steps: modulations and captions; never a site, nor what one leads to."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tests.helpers import analysis_of, capture, make_policy
from toca_fx.examples import build, examples
from toca_fx.graph.ops import aten, linear_input
from toca_fx.lower.analysis import Analysis
from toca_fx.rewrite.step_graph import extract


@cache
def analysis(name: str, memory: int = 64) -> Analysis:
    model, inputs = build(examples()[name])
    return analysis_of(*capture(model, **inputs), make_policy(hoisting={"memory": memory}))


def paths(found: Analysis, names: tuple[str, ...], target: Any = aten.linear.default) -> list[str]:
    return [
        node.meta["path"]
        for node in found.aten.graph.nodes
        if node.name in names and node.target is target
    ]


def linears(found: Analysis, kind: str) -> list[str]:
    """Paths of the linear layers in a step graph."""
    plan = found.plan(None)
    step = next(step for step in plan.steps if step.kind == kind)
    left = found.step_graph(plan, step.modes).module.graph
    names = {node.name for node in left.nodes}
    return [
        node.meta["path"]
        for node in found.aten.graph.nodes
        if linear_input(node) is not None and node.name in names
    ]


def test_modulations_depend_on_the_timestep() -> None:
    found = analysis("DiTTransformer2DModel")
    blocks = [f"transformer_blocks.{layer}.norm1.linear" for layer in range(2)]
    assert paths(found, found.hoisted.timed) == [*blocks, "proj_out_1"]
    assert paths(found, found.hoisted.conditions) == []
    for kind in ("full", "partial"):
        assert not [path for path in linears(found, kind) if "norm1" in path], (
            "the blocks' embedders are gone as well"
        )


def test_keys_and_values_of_a_caption_are_conditions() -> None:
    found = analysis("PixArtTransformer2DModel")
    keys_and_values = [
        f"transformer_blocks.{layer}.attn2.to_{what}" for layer in range(2) for what in "kv"
    ]
    assert paths(found, found.hoisted.conditions) == keys_and_values
    assert paths(found, found.hoisted.timed) == [
        "adaln_single.emb.timestep_embedder.linear_2",
        "adaln_single.linear",
    ]
    left = linears(found, "full")
    assert not [
        path for path in left if "caption" in path or path in keys_and_values or "adaln" in path
    ]
    assert "transformer_blocks.1.attn2.to_q" in left


def test_joint_streams_stay_in_the_step() -> None:
    found = analysis("FluxTransformer2DModel")
    assert "context_embedder" in paths(found, found.hoisted.conditions)
    assert not [
        path for path in paths(found, found.hoisted.names) if ".attn." in path or ".ff" in path
    ]
    plan = found.plan(None)
    left = found.step_graph(plan, plan.full_modes).module.graph
    assert not left.find_nodes(op="call_function", target=aten.cos.default), (
        "tables of positions are conditions"
    )


@pytest.mark.parametrize(
    "name",
    [
        "DiTTransformer2DModel",
        "PixArtTransformer2DModel",
        "FluxTransformer2DModel",
        pytest.param(
            "HunyuanVideoTransformer3DModel",
            marks=pytest.mark.slow(reason="of the classes, three are enough"),
        ),
    ],
)
def test_no_site_and_nothing_behind_one_is_hoisted(name: str) -> None:
    found = analysis(name)
    cached = {site.output for site in found.matches.sites}
    nodes = {node.name: node for node in found.aten.graph.nodes}
    seen: set[fx.Node] = set()
    pending = [nodes[name] for name in found.hoisted.names]
    while pending:
        node = pending.pop()
        assert node.name not in cached
        assert node.meta.get("role") != "latents"
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)


def test_without_memory_nothing_is_hoisted() -> None:
    found = analysis_of(
        *capture(*_built("PixArtTransformer2DModel")), make_policy(hoisting={"memory": 0})
    )
    assert found.hoisted.names == ()
    assert found.hoisted_bytes == found.hoisted_flops == (0, 0)


def _built(name: str) -> tuple[Any, ...]:
    model, inputs = build(examples()[name])

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
        ) -> Tensor:
            rest = {
                key: value
                for key, value in inputs.items()
                if key not in ("hidden_states", "timestep", "encoder_hidden_states")
            }
            return self.model(
                hidden_states,
                timestep=timestep,
                encoder_hidden_states=encoder_hidden_states,
                **rest,
            ).sample

    return Call(), inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"]


class PerToken(nn.Module):
    """A block whose modulation differs from token to token, as for images whose parts are at
    several timesteps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.blocks[0].modulate = nn.Linear(1, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.blocks[0].mlp(x * self.blocks[0].modulate(timestep[..., None]))


@pytest.mark.parametrize(("tokens", "hoisted"), [(12, 0), (1, 1)])
def test_a_modulation_of_each_token_stays_where_fresh_tokens_can_be_picked(
    tokens: int, hoisted: int
) -> None:
    model, x = PerToken(), torch.randn(2, 12, 8)
    captured, inputs = capture(model, x, timestep=torch.rand(2, tokens))
    assert (
        len(analysis_of(captured, inputs, make_policy(scores={"staleness": 1.0})).hoisted.timed)
        == hoisted
    )


class TwoTimes(nn.Module):
    """A block that is modulated by two timesteps, one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.shift, self.scale = nn.Linear(1, 8), nn.Linear(1, 8)

    def forward(self, x: Tensor, sound_time: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.shift(time[:, None, None]), self.scale(sound_time[:, None, None])
        return x + self.blocks[0].mlp(x * scale + shift)


def test_only_the_first_timestep_says_what_its_values_are() -> None:
    times = {"sound_time": torch.rand(2), "time": torch.rand(2)}
    captured, inputs = capture(TwoTimes(), torch.randn(2, 12, 8), **times)
    found = analysis_of(captured, inputs, make_policy())
    assert paths(found, found.hoisted.timed) == ["shift"]
    assert found.hoisted.conditions == ()
    assert found.inputs.conditions == ()


def test_a_part_computes_what_the_model_computes() -> None:
    model, inputs = build(examples()["PixArtTransformer2DModel"], dtype=torch.float64)
    program = analysis_of(*(given := capture(model, **inputs)), make_policy())
    wanted = program.hoisted.names
    values: dict[str, Tensor] = {}

    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name in wanted:
                values[n.name] = result
            return result

    Keeping(program.aten).run(*given[1])
    conditions = program.conditions
    found = dict(
        zip(
            program.hoisted.conditions,
            conditions.module(*(given[1][at] for at in conditions.kept)),
            strict=True,
        )
    )
    timed = program.timed
    given_to_timed = [str(buffer.part) for buffer in timed.buffers]
    assert set(given_to_timed) <= set(program.hoisted.conditions)
    found |= dict(
        zip(
            program.hoisted.timed,
            timed.module(
                *(given[1][at] for at in timed.kept), *(found[name] for name in given_to_timed)
            ),
            strict=True,
        )
    )
    assert found.keys() == values.keys() == set(wanted)
    assert all(
        torch.equal(found[name], values[name]) and found[name].is_contiguous() for name in wanted
    )
    assert extract(program.aten, ()).kept == ()
