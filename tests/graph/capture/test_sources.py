"""What Dynamo says while it captures, and how it says that it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from toca_fx.capture.dynamo import uncompiled
from toca_fx.capture.sources import frame_id, model_class
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
