"""Linear layers of few rows on a CPU, in float32.

MKL packs a weight before it multiplies, which pays if many rows use it; oneDNN does well with few.
Measured at widths 1152 and 3072 (tools/PERFORMANCE.md), oneDNN wins up to about 256 rows where a
layer widens, and up to 64 where it narrows.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten

_WIDENING_ROWS, _OTHER_ROWS = 256, 64


@torch.library.custom_op("toca_fx::linear", mutates_args=(), device_types="cpu")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of x [..., in] and weight [out, in]; which library multiplies is decided by the
    number of rows.
    """
    rows = x.numel() // x.shape[-1]
    most = _WIDENING_ROWS if weight.shape[0] > weight.shape[1] else _OTHER_ROWS
    if 0 < rows <= most and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:  # type: ignore[no-untyped-call]
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return F.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def use_few_rows(graph: fx.Graph, fresh: Collection[str]) -> None:
    """Let the linear layers among the nodes ``fresh``, which work on fresh tokens only, decide by
    their number of rows.
    """
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        weight, *bias = node.args[1:]
        if (
            node.name in fresh
            and _is_plain(node)
            and all(_is_plain(operand) for operand in (weight, *bias) if operand is not None)
        ):
            node.target, node.args = (
                torch.ops.toca_fx.linear.default,
                (node.args[0], weight, bias[0] if bias else None),
            )


def _is_plain(node: fx.Node) -> bool:
    value = node.meta[
        "val"
    ]  # of a layer: for all tokens, and under autocast in the type that it casts to
    return bool(
        value.device.type == "cpu" and value.dtype == torch.float32 and value.is_contiguous()
    )
