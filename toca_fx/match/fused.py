"""Operators that are an attention as a whole: PyTorch's, those of libraries, and the user's own."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx

from toca_fx.graph.names import namespace, operator_name
from toca_fx.graph.ops import FLEX, argument, aten, overloads_of

Layout = Literal["bhnd", "bnhd"]


@dataclass(frozen=True)
class Attention:
    """An attention in a graph, and its operands.

    ``output`` is its result. ``query``, ``key`` and ``value`` are what it reads, in ``layout``
    (heads and samples may be one axis in spelled-out attention, whose key may be transposed).
    ``weights`` is the map, if the graph has it; ``scale`` is what products are multiplied by (None:
    width ** -0.5). ``plain`` says that the map is the softmax of these products and of nothing
    else, as far as is known: no mask, no function of positions.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    weights: fx.Node | None = None
    layout: Layout = "bhnd"
    scale: Any = None
    plain: bool = True


@dataclass(frozen=True)
class _Operator:
    query: int = 0
    key: int = 1
    value: int = 2
    layout: Layout = "bhnd"


_BNHD = _Operator(layout="bnhd")

# By name: the libraries need not be there. Of those that return several tensors, the first counts.
_BY_NAME: Mapping[str, _Operator] = {
    "aten::_efficient_attention_forward": _BNHD,
    "aten::_flash_attention_forward": _BNHD,
    "flash_attn::_flash_attn_forward": _BNHD,
    "flash_attn_3::_flash_attn_forward": _BNHD,
    "flash_attn_3::fwd": _BNHD,
    "_diffusers_flash_attn_3::_flash_attn_forward": _BNHD,
    "xformers::efficient_attention_forward_cutlass": _BNHD,
    "xformers_flash::flash_fwd": _BNHD,
    "xformers_flash3::flash_fwd": _BNHD,
    "sageattention::sageattn": _Operator(),
}
# What some are told of the order of axes.
_LAYOUTS: Mapping[object, Layout] = {"HND": "bhnd", "NHD": "bnhd"}

_registered: dict[object, _Operator] = {
    aten.scaled_dot_product_attention.default: _Operator(),
    FLEX: _Operator(),
}


def register_attention(
    op: Callable[..., Any], *, query: int = 0, key: int = 1, value: int = 2, layout: Layout = "bhnd"
) -> None:
    """Make a fused attention operator known, such as ``torch.ops.my_lib.attention``.

    ``query``, ``key`` and ``value`` are the positions of these arguments; ``layout`` is the order
    of their axes: "bhnd" [batch, heads, tokens, width] as in PyTorch, or "bnhd" as in
    flash-attention. An argument called ``scale``, ``softmax_scale`` or ``sm_scale`` is honoured,
    else the scale is width ** -0.5. It has to return a tensor in the layout of the query, or
    several of which that is the first. FlashAttention's operators, those of xformers and
    SageAttention's are known by their names.

    Raises:
        TypeError: ``op`` is no operator of ``torch.ops`` (see ``torch.library.custom_op``).
        ValueError: an unknown layout.
    """
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f'layout={layout!r}: expected "bhnd" or "bnhd"')
    overloads = overloads_of(op)
    if not overloads:
        raise TypeError(
            f"register_attention({op!r}): expected an operator such as torch.ops.my_lib.attention"
        )
    for overload in overloads:
        _registered[overload] = _Operator(query, key, value, layout)


def fused_at(node: fx.Node) -> Attention | None:
    """The attention whose result is ``node``, that of a fused operator; None if it is none."""
    call: Any = node
    if node.target is operator.getitem:
        call = node.args[0] if node.args[1] == 0 else None
    if not isinstance(call, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return None
    known = _known(call)
    if known is None:
        return None
    query, key, value = (
        call.args[at] if at < len(call.args) else None
        for at in (known.query, known.key, known.value)
    )
    if isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node):
        layout = _LAYOUTS.get(argument(call, "tensor_layout"), known.layout)
        scale = argument(call, "scale", "softmax_scale", "sm_scale")
        if call.target is FLEX:
            scale = call.args[5]
        return Attention(node, query, key, value, layout=layout, scale=scale, plain=_is_plain(call))
    return None


def _known(call: fx.Node) -> _Operator | None:
    """The row of the operator that is called."""
    known = _registered.get(call.target)
    if known is None and operator_name(call.target):
        known = _BY_NAME.get(f"{namespace(call.target)}::{operator_name(call.target)}")
    return known


def _is_plain(call: fx.Node) -> bool:
    """Whether an operator is given nothing that changes scores, as far as is known."""
    if call.target is FLEX:
        mask: Any = call.args[4]
        return _returns_its_first(call.args[3], call) and _is_the_same_everywhere(mask[-1], call)
    if call.target is aten.scaled_dot_product_attention.default:
        return True  # scores are computed by kernels that take whatever it takes
    given = ("attn_mask", "attn_bias", "bias", "mask", "is_causal", "causal", "alibi_slopes")
    return not any(argument(call, name) for name in given)


def _code(operand: object, call: fx.Node) -> fx.Graph | None:
    """The graph of the code that a call is given as ``operand``."""
    owner = call.graph.owning_module
    target = operand.target if isinstance(operand, fx.Node) else ""
    code = getattr(owner, str(target), None)
    return code.graph if isinstance(code, fx.GraphModule) else None


def _returns_its_first(operand: object, call: fx.Node) -> bool:
    """Whether code returns the first of its arguments, whatever the others: scores as they are."""
    graph = _code(operand, call)
    if graph is None:
        return False
    return graph.output_node().args[0] is graph.find_nodes(op="placeholder")[0]


def _is_the_same_everywhere(operand: object, call: fx.Node) -> bool:
    """Whether code makes a tensor of ones and does nothing else: a mask that hides nothing."""
    graph = _code(operand, call)
    if graph is None:
        return False
    made = [node.target for node in graph.nodes if node.op == "call_function"]
    return made in ([aten.new_ones.default], [aten.ones.default])
