"""A graph that is put together of copies is the one that a trace of the whole graph gives."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from tests.helpers import capture
from toca_fx.capture.retrace import retrace
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.examples import build, examples

Description = tuple[str, object, str, object, object]


class Function(nn.Module):
    """A function of one tensor as a model."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def as_is(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.contiguous()
    z = y.to(torch.float32).contiguous()
    return x + z.relu() + y, x


def of_parts(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    for _ in range(2):
        left, right = (left + right).chunk(1)[0], F.gelu(left) * right
    return torch.cat([left, right, left], dim=-1)


def strided(x: Tensor) -> Tensor:
    # By itself, the part of x has no memory beyond its end.
    return x[:1].as_strided((2, 4), (8, 2)) + 1


def half_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :4] *= 2
    return y.relu()


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("DiTTransformer2DModel", []),
        ("PixArtTransformer2DModel", []),
        ("FluxTransformer2DModel", []),
        ("SD3Transformer2DModel", []),
        # np.sqrt(...) is a tensor to Dynamo, and torch.add reads the number in it.
        ("CosmosTransformer3DModel", ["norm_1 cannot be run by itself"]),
    ],
)
def test_models_are_as_if_traced_whole(
    name: str, reasons: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, call = build(examples()[name])
    captured, inputs = capture(model, **call)
    found = checked(captured, inputs, caplog)
    assert len(found) == len(reasons)
    assert all(map(operator.contains, found, reasons))


@pytest.mark.parametrize("function", [as_is, of_parts, strided])
def test_functions_are_as_if_traced_whole(
    function: Callable[[Tensor], Any], caplog: pytest.LogCaptureFixture
) -> None:
    captured, inputs = capture(Function(function), torch.randn(2, 8))
    assert not checked(captured, inputs, caplog)


def data_read(x: Tensor) -> Tensor:
    y = x * 2
    return y.data.relu() + y.data[:1].data


def test_data_is_no_constant() -> None:
    captured, inputs = capture(Function(data_read), torch.randn(2, 8))
    traced = retrace(captured, [FakeTensorMode().from_tensor(value) for value in inputs], {})
    assert not traced.graph.find_nodes(op="get_attr")
    other = torch.randn(2, 8)
    assert torch.equal(traced(other)[0], data_read(other))


def test_graphs_with_writes_are_traced_whole(caplog: pytest.LogCaptureFixture) -> None:
    captured, inputs = capture(Function(half_in_place), torch.randn(2, 8))
    (reason,) = checked(captured, inputs, caplog)
    assert "setitem does more than to return something" in reason


def test_numbers_out_of_tensors_are_refused() -> None:
    """They are made numbers before a graph is traced: see test_numbers.py."""
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        captured, inputs = capture(Function(lambda x: x * x.sum().item()), torch.randn(2, 8))
    with pytest.raises(UnsupportedModelError, match=r"test_retrace\.py:[0-9]+ \(.*item\(\)"):
        retrace(captured, fakes_of(inputs), {})


def test_equal_blocks_are_traced_once() -> None:
    traced: list[torch.Size] = []

    def block(x: Tensor, weight: Tensor) -> Tensor:
        traced.append(x.shape)
        return F.linear(x, weight).relu()

    torch.compiler.allow_in_graph(block)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.weights:
                x = block(x, weight)
            return block(x[:1], self.weights[0])

    captured, inputs = capture(Blocks(), torch.randn(2, 8))
    traced.clear()  # Dynamo has run them too
    graph = retrace(captured, fakes_of(inputs), {}).graph
    assert traced == [(2, 8), (1, 8)]
    linears = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert len({node.args[1] for node in linears}) == 4
    assert len(linears) == 5


def checked(
    captured: fx.GraphModule, inputs: Sequence[Any], caplog: pytest.LogCaptureFixture
) -> list[str]:
    """Check that both graphs are the same, node by node; why it was traced whole, if it was."""
    caplog.set_level(logging.DEBUG, "toca_fx")
    actual = retrace(captured, fakes_of(inputs), {})
    run = fx.Interpreter(captured).run
    with preserve_node_meta():
        expected = make_fx(run, tracing_mode="fake", pre_dispatch=True)(*fakes_of(inputs))
    assert described(actual.graph) == described(expected.graph)
    assert actual.code == expected.code
    return [text for text in caplog.messages if "all calls are traced" in text]


def described(graph: fx.Graph) -> list[Description]:
    """Each node: operator, target, arguments, layouts of what it returns, and modules."""
    position = {node: at for at, node in enumerate(graph.nodes)}

    def arguments(node: fx.Node) -> str:
        given = (node.args, node.kwargs)
        return repr(fx.node.map_arg(given, lambda operand: f"%{position[operand]}"))

    return [
        (
            node.op,
            node.target,
            arguments(node),
            layout(node.meta.get("val")),
            list(node.meta.get("nn_module_stack", {}).values()),
        )
        for node in graph.nodes
    ]


def layout(value: Any) -> object:
    if isinstance(value, (tuple, list)):
        return [*map(layout, value)]
    if not isinstance(value, Tensor):
        return value
    return value.shape, value.stride(), value.dtype, value.device


def fakes_of(inputs: Sequence[Any]) -> list[Any]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return [
        mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
        for value in inputs
    ]
