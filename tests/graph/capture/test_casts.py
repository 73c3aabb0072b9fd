"""Regions of autocast become casts: the graph computes without them, bit for bit, what the model
does with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from tests.helpers import capture
from toca_fx.capture.aten import to_aten
from toca_fx.capture.casts import bake, note
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.graph.autocast import OFF, Autocast
from toca_fx.torch_private import FakeTensorMode

aten = torch.ops.aten

BF16 = Autocast((("cpu", torch.bfloat16),))
F16 = Autocast((("cpu", torch.float16),))
HALF_ON_CUDA = Autocast((("cuda", torch.float16),))


class Model(nn.Module):
    """A function of a tensor [2, 4, 8] and of a layer."""

    def __init__(self, function: Callable[[Tensor, nn.Linear], Any]) -> None:
        super().__init__()
        # Of weights with gradients autocast keeps a copy, in the dtype of the first region.
        self.function, self.layer = function, nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.layer)


def region(enabled: bool = True, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=enabled)


def attention(x: Tensor, layer: nn.Linear) -> Tensor:
    q = layer(x)
    return F.scaled_dot_product_attention(q[None], x[None], x[None])


def normed(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.rms_norm(F.layer_norm(layer(x), (8,), layer.bias), (8,))


def of_parts(x: Tensor, layer: nn.Linear) -> Tensor:
    # Neither has a kernel of autocast's on the CPU: what they are made of has one.
    return torch.inner(x, layer.weight) + torch.tensordot(x, layer.weight, dims=([2], [0]))


def written(x: Tensor, layer: nn.Linear) -> Tensor:
    y = layer(x).float()
    y[:, :2] = layer(y[:, 2:])
    return y.mul_(2) + layer(y)


def written_by_a_product(x: Tensor, layer: nn.Linear) -> Tensor:
    # Autocast leaves writes in place alone, those of products too.
    return x[0].clone().addmm_(x[1], layer.weight)


def mixed(x: Tensor, layer: nn.Linear) -> Tensor:
    y = layer(x)
    return torch.cat([x, y], -1) + torch.stack([y.float(), y.float()]).flatten(0, 1)[:2].repeat(
        1, 1, 2
    )


def convolved(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.conv1d(x, layer.weight[:4, :4, None], padding="same") + F.pad(x, (1, 1))[..., 1:-1]


def several(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    left, right = layer(x).chunk(2, -1)
    return left * F.silu(right), F.mse_loss(left, right, reduction="none")


def switched_off(x: Tensor, layer: nn.Linear) -> Tensor:
    y = layer(x)
    with region(False):
        y = layer(y.float())
    return layer(y)


def other_dtype(x: Tensor, layer: nn.Linear) -> Tensor:
    with region(dtype=torch.float16), region(False), region():
        y = layer(x)
    with region(dtype=torch.float16):
        return layer(y)


def without_gradients(x: Tensor, layer: nn.Linear) -> Tensor:
    with torch.no_grad(), region():
        y = layer(x)
    with torch.enable_grad(), torch.profiler.record_function("part"):
        y = layer(y.float())
    with torch.inference_mode():
        return layer(y.float())


def of_a_constant(x: Tensor, layer: nn.Linear) -> Tensor:
    with region():
        return layer(x) @ torch.tensor([[1.0] * 8, [2.0] * 8]).mT


@torch.compiler.allow_in_graph
def _closed(x: Tensor, weight: Tensor) -> Tensor:
    y = F.linear(x, weight)
    with region(dtype=torch.float16), torch.no_grad():
        y = F.linear(y, weight)
        with region(False):
            y = F.linear(y.float(), weight)
        return F.linear(y, weight)


def in_closed_calls(x: Tensor, layer: nn.Linear) -> Tensor:
    """Dynamo does not look into such a call."""
    with region():
        y = _closed(x, layer.weight)
    return layer(_closed(y.float(), layer.weight).float())


def in_branches(x: Tensor, layer: nn.Linear) -> Tensor:
    """The code of a branch is a graph of its own."""

    def twice(x: Tensor) -> Tensor:
        return layer(x).float() * 2

    def inner(x: Tensor) -> Tensor:
        return torch.cond(x.min() < -100, twice, lambda x: layer(x).float(), (x,))

    with region():
        y = torch.cond(x.sum() < 100, twice, inner, (x,))
    return y + torch.cond(x.sum() > 100, twice, inner, (x,))


def wrapped(x: Tensor, layer: nn.Linear) -> Tensor:
    def code(x: Tensor) -> Tensor:
        with region(dtype=torch.float16):
            y = layer(x)
        return layer(y.float()).float()

    with region():
        y = checkpoint(code, x, use_reentrant=False)
    return checkpoint(code, y, use_reentrant=False)


FUNCTIONS = [
    attention,
    normed,
    of_parts,
    written,
    written_by_a_product,
    mixed,
    convolved,
    several,
    switched_off,
    other_dtype,
    without_gradients,
    of_a_constant,
    in_closed_calls,
    in_branches,
    wrapped,
]


@pytest.mark.parametrize("around", [OFF, BF16, F16], ids=["off", "bfloat16", "float16"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_graphs_are_the_model_without_autocast(
    function: Callable[[Tensor, nn.Linear], Any], around: Autocast
) -> None:
    torch.manual_seed(0)
    model, x = Model(function), torch.randn(2, 4, 8)
    with torch.no_grad(), around.again():
        expected = as_list(model(x))
        captured, inputs = capture(model, x)
        module = to_aten(captured, inputs)
    with torch.no_grad():
        actual = as_list(module(*inputs))
    (end,) = module.graph.find_nodes(op="output")
    for ours, theirs, node in zip(actual, expected, end.args[0], strict=True):
        assert ours.dtype == theirs.dtype == node.meta["val"].dtype
        assert torch.equal(ours, theirs)
    assert not [node for node in module.graph.nodes if "autocast" in node.meta]


def test_weights_and_timesteps_may_differ_in_dtype() -> None:
    """As in Mochi; without its region, the layer is an error."""

    def embed(t: Tensor, layer: nn.Linear) -> Tensor:
        with region():
            return layer(t.float())

    model, t = Model(embed).to(torch.bfloat16), torch.randn(2, 8)
    captured, inputs = capture(model, t)
    with torch.no_grad():
        (actual,) = to_aten(captured, inputs)(*inputs)
        assert torch.equal(actual, model(t))


def test_calls_in_other_regions_are_no_copies() -> None:
    def thrice(x: Tensor, layer: nn.Linear) -> Tensor:
        with region():
            first = layer(x)
        with region():
            second = layer(x)
        return first + second + layer(x)

    captured, inputs = capture(Model(thrice), torch.randn(2, 8))
    graph = to_aten(captured, inputs).graph
    linears = graph.find_nodes(op="call_function", target=aten.linear.default)
    dtypes = [node.meta["val"].dtype for node in linears]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_nothing_changes_where_autocast_changes_nothing() -> None:
    def function(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.layer_norm(F.rms_norm(F.pad(x, (1, 1)).relu()[..., 1:-1], (8,)), (8,))

    model, x = Model(function), torch.randn(2, 4, 8)
    captured, inputs = capture(model, x)
    with BF16.again():
        inside = to_aten(captured, inputs).graph
    assert targets(inside) == targets(to_aten(captured, inputs).graph)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (F.linear, [aten.to.dtype, aten.to.dtype, aten.linear.default]),
        (
            lambda x, _: F.layer_norm(x.half(), (8,)),
            [*[aten.to.dtype] * 2, aten.layer_norm.default],
        ),
        (lambda x, _: x.half().softmax(-1), [aten.to.dtype, aten.softmax.int]),
        (lambda x, _: x.cpu() @ x.cpu().mT, [*[aten.to.dtype_layout] * 2, aten.mT.default]),
    ],
    ids=["linear", "layer_norm", "softmax", "another device"],
)
def test_devices_have_their_own_rules(
    function: Callable[[Tensor, Tensor], Tensor], expected: Sequence[Any]
) -> None:
    """On CUDA, norms and softmaxes are computed in float32."""
    with FakeTensorMode():
        x, weight = (torch.empty(8, 8, device="cuda") for _ in range(2))
    trace = make_fx(function, tracing_mode="fake", pre_dispatch=True)
    with HALF_ON_CUDA.again():
        graph = trace(x, weight).graph
    for node in graph.nodes:
        note(node, HALF_ON_CUDA)
    wanted = [node.meta["val"].dtype for node in graph.find_nodes(op="output")[0].all_input_nodes]
    bake(graph)
    assert targets(graph)[: len(expected)] == expected
    (result,) = graph.find_nodes(op="output")[0].all_input_nodes
    assert [result.meta["val"].dtype] == wanted


def test_a_region_in_a_branch_is_refused_by_the_users_line() -> None:
    def branching(x: Tensor, layer: nn.Linear) -> Tensor:
        def inside(x: Tensor) -> Tensor:
            with region():
                return layer(x).float()

        return torch.cond(x.sum() > 0, inside, layer, (x,))

    captured, inputs = capture(Model(branching), torch.randn(2, 8))
    with pytest.raises(UnsupportedModelError, match=r"test_casts.py:\d+ .*put the region around"):
        to_aten(captured, inputs)


def test_calls_with_an_effect_are_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch._functorch.predispatch._enter_dual_level)
    graph.output((x,))
    with pytest.raises(UnsupportedModelError, match="whose effect would get lost"):
        to_aten(fx.GraphModule(nn.Module(), graph), [torch.ones(2)])


def as_list(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]
