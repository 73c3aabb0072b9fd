"""What Dynamo says while it captures, and how it says that it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tests.helpers import capture
from toca_fx.capture.aten import to_aten
from toca_fx.capture.dynamo import uncompiled
from toca_fx.capture.sources import frame_id, input_sources, model_class
from toca_fx.torch_private import BackendCompilerFailed, TorchDynamoException


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_backend_knows_code_and_model() -> None:
    told: list[tuple[int | None, str]] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        told.append((frame_id(), model_class()))
        return graph

    model = torch.compile(Doubling(), backend=backend, dynamic=False)
    model(torch.ones(2))
    model(torch.ones(3))
    (first, name), (second, _) = told
    assert isinstance(first, int)
    assert first == second  # compiled again, but the same code
    assert name == "Doubling"
    assert (frame_id(), model_class()) == (None, "")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fn = nn.Linear(4, 4)  # a name that Dynamo uses too

    def forward(block, x: Tensor) -> Tensor:  # noqa: N805 - any name will do
        return block.fn(x)


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.table = torch.ones(4)  # no buffer

    def forward(m, x: Tensor) -> Tensor:  # noqa: N805
        return m.blocks[0](x + m.table)


@dataclass
class Pipe:
    transformer: nn.Module


def captured_by(call: Callable[..., Tensor], *args: Any) -> tuple[fx.GraphModule, str]:
    """The ATen graph of a call, and the name of the model's class."""
    found: list[tuple[fx.GraphModule, str]] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        input_sources(graph)
        found.append((to_aten(graph, inputs), model_class()))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(call, backend=backend, fullgraph=True)(*args)
    return found[0]


def closure(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(1 * x)


def of_pipeline(model: nn.Module) -> Callable[[Tensor], Tensor]:
    pipe = Pipe(model)
    return lambda x: pipe.transformer(1 * x)


def paths(graph: fx.GraphModule) -> list[str]:
    linears = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return [node.meta["path"] for node in linears]


CALLS: dict[str, tuple[Callable[[nn.Module], Callable[..., Tensor]], str]] = {
    "the model": (lambda model: model, "Numbered"),
    "its forward": (lambda model: model.forward, "Numbered"),
    "a function of the model": (
        lambda model: partial(lambda model, x: model(x), model),
        "",
    ),
    "a closure": (closure, ""),
    "a pipeline": (of_pipeline, ""),
}


@pytest.mark.parametrize("name", CALLS)
def test_paths_are_those_in_the_model_whatever_it_is_called(name: str) -> None:
    make, expected = CALLS[name]
    model, x = Numbered().requires_grad_(False), torch.ones(2, 4)
    graph, owner = captured_by(make(model), x)
    assert paths(graph) == ["blocks.0.fn"] == paths(to_aten(*capture(model, x)))
    roles = [node.meta["role"] for node in graph.graph.find_nodes(op="placeholder")]
    assert sorted(roles) == ["latents", "state", "state", "state"]
    assert owner == expected


def test_paths_of_two_models_begin_with_their_names() -> None:
    def both(one: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
        return other(one(x))

    graph, _ = captured_by(both, *(Numbered().requires_grad_(False) for _ in "12"), torch.ones(4))
    assert paths(graph) == ["one.blocks.0.fn", "other.blocks.0.fn"]


def test_errors_of_a_backend_are_wrapped() -> None:
    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        raise RuntimeError("on purpose")

    with pytest.raises(BackendCompilerFailed, match="on purpose"):
        torch.compile(Doubling(), backend=backend)(torch.ones(2))


def test_a_broken_graph_is_an_error_of_dynamo() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(TorchDynamoException):
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_copy_runs_the_models_own_code(wrapped: bool) -> None:
    calls: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        calls.append(graph)
        return graph

    model = Doubling()
    model.compile(backend=backend)
    twin = uncompiled(torch.compile(model, backend=backend) if wrapped else model)
    assert type(twin) is Doubling
    assert twin(torch.ones(2)).tolist() == [2.0, 2.0]
    assert not calls
    model(torch.ones(2))
    assert calls  # the original is as it was
