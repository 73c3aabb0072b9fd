"""Operators that torch makes of others are gone from a capture, and what is left has rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from tests.helpers import capture
from toca_fx.capture.aten import to_aten
from toca_fx.capture.casts import bake, note
from toca_fx.capture.decompositions import DECOMPOSITIONS, take_apart
from toca_fx.graph import ops
from toca_fx.graph.autocast import OFF, Autocast
from toca_fx.graph.ops import is_pointwise
from toca_fx.torch_private import FakeTensorMode, trace

aten = torch.ops.aten

WEIGHT = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5)


def heads(x: Tensor) -> Tensor:
    """[B, N, heads, D]."""
    return x.unflatten(-1, (2, -1))


# By what they are in ``torch``, of x [2, 6, 4].
SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "movedim": lambda x: x.movedim(1, 2),
    "movedim of two": lambda x: x.movedim((0, 1), (1, 2)),
    "moveaxis": lambda x: x.moveaxis(0, -1),
    "moveaxis of two": lambda x: x.moveaxis((0, 1), (1, 2)),
    "swapaxes": lambda x: x.swapaxes(0, -1),
    "swapdims": lambda x: x.swapdims(0, 1),
    "mT": lambda x: x.mT,
    "mH": lambda x: x.mH,
    "H": lambda x: x[0].H,
    "adjoint": lambda x: x.adjoint(),
    "T": lambda x: x[0].T,
    "view_as": lambda x: x.view_as(WEIGHT.new_zeros(2, 2, 3, 4)),
    "reshape_as": lambda x: x.reshape_as(WEIGHT.new_zeros(2, 2, 3, 4)),
    "ravel": lambda x: x.ravel(),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "broadcast_to": lambda x: x[:, :1].broadcast_to(2, 6, 4),
    "tile": lambda x: x.tile(2, 1, 1),
    "tensor_split": lambda x: x.tensor_split(3, -1)[1],
    "tensor_split at": lambda x: x.tensor_split((1, 3), dim=1)[1],
    "unsafe_chunk": lambda x: x.unsafe_chunk(2, -1)[1],
    "hsplit": lambda x: x.hsplit(2)[1],
    "hsplit at": lambda x: x.hsplit((1, 2))[1],
    "vsplit": lambda x: x.vsplit(2)[1],
    "vsplit at": lambda x: x.vsplit((1,))[1],
    "dsplit": lambda x: x.dsplit(2)[1],
    "dsplit at": lambda x: x.dsplit((1, 3))[1],
    "take_along_dim": lambda x: x.take_along_dim((x > 0).long(), -1),
    "concat": lambda x: torch.concat([x, x], -1),
    "concatenate": lambda x: torch.concatenate([x, x], -1),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x, x]),
    "dstack": lambda x: torch.dstack([x, x]),
    "column_stack": lambda x: torch.column_stack([x, x]),
    "row_stack": lambda x: torch.row_stack([x, x]),
    "atleast_1d": torch.atleast_1d,
    "atleast_2d": lambda x: torch.atleast_2d(x[0, 0]),
    "atleast_3d": lambda x: torch.atleast_3d(x[0]),
    "atleast_1d of two": lambda x: torch.atleast_1d([x[0], x[1]])[1],
    "atleast_2d of two": lambda x: torch.atleast_2d([x[0], x[1]])[1],
    "atleast_3d of two": lambda x: torch.atleast_3d([x[0], x[1]])[1],
    "pad": lambda x: F.pad(x, (0, 2)),
    "fliplr": lambda x: x.fliplr(),
    "flipud": lambda x: x.flipud(),
    "real": lambda x: torch.complex(x, x).real,
    "imag": lambda x: torch.complex(x, x).imag,
    "type_as": lambda x: x.bool().type_as(x),
    "multiply": lambda x: x.multiply(x),
    "multiply by a number": lambda x: aten.multiply.Scalar(x, 3),
    "subtract": lambda x: x.subtract(x),
    "subtract a number": lambda x: aten.subtract.Scalar(x, 3),
    "divide": lambda x: x.divide(x),
    "divide by a number": lambda x: aten.divide.Scalar(x, 3),
    "divide, rounded": lambda x: x.divide(x, rounding_mode="floor"),
    "divide by a number, rounded": lambda x: aten.divide.Scalar_mode(x, 3, rounding_mode="floor"),
    "true_divide": lambda x: x.true_divide(x),
    "true_divide by a number": lambda x: aten.true_divide.Scalar(x, 3),
    "negative": lambda x: x.negative(),
    "absolute": lambda x: x.absolute(),
    "clip": lambda x: x.clip(0, 1),
    "clip by tensors": lambda x: x.clip(x - 1, x + 1),
    "prelu": lambda x: F.prelu(x, WEIGHT[0, :1]),
    "expit": torch.special.expit,
    "logit": lambda x: torch.special.logit(x, 1e-3),
    "special softmax": lambda x: torch.special.softmax(x, -1),
    "where, a number": lambda x: torch.where(x > 0, x, 0.5),
    "where, a number first": lambda x: torch.where(x > 0, 0.5, x),
    "where, numbers": lambda x: torch.where(x > 0, 0.5, 0.25),
    "std": lambda x: x.std(-1),
    "var": lambda x: x.var(-1, unbiased=False),
    "std_mean": lambda x: torch.std_mean(x, -1)[1],
    "var_mean": lambda x: torch.var_mean(x, -1)[0],
    "linalg.norm": lambda x: torch.linalg.norm(x, dim=-1),
    "norm by name": lambda x: aten.frobenius_norm.dim(x, [-1], True),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "einsum": lambda x: torch.einsum("bnc,ch->bnh", x, WEIGHT),
    "einsum of three": lambda x: torch.einsum("bnc,ch,bmc->bnmh", x, WEIGHT, x),
    "einsum of heads": lambda x: torch.einsum("bnhd,bmhd->bhnm", heads(x), heads(x.flip(1))),
    "einsum of heads, turned": lambda x: torch.einsum("bnhd,bmhd->hmbn", heads(x), heads(x + 1)),
    "einsum of heads, broadcast": lambda x: torch.einsum("bnhd,bmhd->bhnm", heads(x), heads(x[:1])),
    "einsum of heads, summed": lambda x: torch.einsum("bnhd,bmhd->bhn", heads(x), heads(x)),
    "einsum, implicit": lambda x: torch.einsum("bnc,cd", x, WEIGHT),
    "einsum with the rest": lambda x: torch.einsum("...c,cd->...d", x, WEIGHT),
    "inner": lambda x: torch.inner(x, WEIGHT.t()),
    "tensordot": lambda x: torch.tensordot(x, WEIGHT, 1),
    "outer": lambda x: torch.outer(x[0, 0], x[0, 1]),
    "kron": lambda x: torch.kron(x[0], x[0]),
    "linalg.matmul": lambda x: torch.linalg.matmul(x, WEIGHT),
    "multi_dot": lambda x: torch.linalg.multi_dot([x[0], WEIGHT, WEIGHT.t()]),
    "chain_matmul": lambda x: aten.chain_matmul([x[0], WEIGHT, WEIGHT.t()]),
    "vecdot": lambda x: torch.linalg.vecdot(x, x),
}

# Without operands that depend on x; what they return is a constant.
CONSTANTS = {
    aten.scalar_tensor.default,
    aten.new_zeros.default,
    aten.lift_fresh_copy.default,
    aten.detach.default,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_is_left_has_rules(name: str) -> None:
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    traced = make_fx(
        SPELLINGS[name],
        tracing_mode="fake",
        pre_dispatch=True,
        decomposition_table=dict(DECOMPOSITIONS),
        _allow_non_fake_inputs=True,
    )(x)
    left = [
        node.target
        for node in traced.graph.nodes
        if node.op == "call_function" and node.target not in ops.OPS and not is_pointwise(node)
    ]
    assert set(left) <= CONSTANTS
    assert (traced(x) - SPELLINGS[name](x)).abs().max() <= 1e-14


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# By the names above: autocast has a kernel for them on the CPU, if not for their parts.
IN_REGIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "prelu": lambda x: F.prelu(x, x[0, 0, :1]),
    "vecdot": SPELLINGS["vecdot"],
    "einsum": lambda x: torch.einsum("bnc,bmc->bnm", x, x),
    "tensordot": lambda x: torch.tensordot(x, x, ([2], [2])),
}


@pytest.mark.parametrize("name", IN_REGIONS)
def test_autocast_casts_what_is_taken_apart(name: str) -> None:
    model = Model(IN_REGIONS[name])
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        captured, inputs = capture(model, x)
        graph = to_aten(captured, inputs)
    (actual,) = graph(*inputs)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
    assert not {node.target for node in graph.graph.nodes} & DECOMPOSITIONS.keys()


OF_CUDA: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "einsum": (IN_REGIONS["einsum"], torch.float16),
    "prelu": (lambda x: F.prelu(x, x.flatten().narrow(0, 0, 1)), torch.float16),
    "multi_dot": (lambda x: torch.linalg.multi_dot([*x.unbind(), x.select(0, 0)]), torch.float16),
    "tensordot": (IN_REGIONS["tensordot"], torch.float32),  # the widest of its operands
}


@pytest.mark.parametrize("name", OF_CUDA)
def test_devices_cast_what_they_have_kernels_for(name: str) -> None:
    function, expected = OF_CUDA[name]
    with FakeTensorMode():
        x = torch.empty(2, 4, 4, device="cuda")
    state = Autocast((("cuda", torch.float16),))
    with state.again():
        graph = trace(function, [x], DECOMPOSITIONS).graph
    for node in graph.nodes:
        note(node, state)
    with OFF.again():
        bake(graph)
        take_apart(graph)
    assert not {node.target for node in graph.nodes} & DECOMPOSITIONS.keys()
    (result,) = graph.output_node().all_input_nodes
    assert result.meta["val"].dtype == expected


def test_the_table_is_covered() -> None:
    tried = set()
    for spelling in SPELLINGS.values():
        traced = make_fx(
            spelling, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True
        )(torch.ones(2, 6, 4, dtype=torch.float64))
        tried |= {node.target for node in traced.graph.nodes}
    untried = {str(overload) for overload in DECOMPOSITIONS if overload not in tried}
    # TorchScript's own, which no graph has.
    untried -= {f"aten.{name}.a" for name in ("mT", "mH", "matrix_H", "numpy_T")}
    assert untried - {"aten.einsum.sublist"} == set()


def test_no_operator_has_a_rule_and_is_taken_apart() -> None:
    assert not DECOMPOSITIONS.keys() & ops.OPS.keys()
