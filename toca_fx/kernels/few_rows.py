"""Linear layers of few rows on a CPU, in float32.

MKL packs a weight before it multiplies, which pays if many rows use it; oneDNN does well with few.
Measured at widths 1152 and 3072 (tools/PERFORMANCE.md), oneDNN wins up to about 256 rows where a
layer widens, and up to 64 where it narrows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WIDENING_ROWS, _OTHER_ROWS = 256, 64


@torch.library.custom_op("toca_fx::linear", mutates_args=(), device_types="cpu")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of x [..., in], weight [out, in] and bias [out].

    The number of rows decides which library multiplies.
    """
    rows = x.numel() // x.shape[-1]
    most = _WIDENING_ROWS if weight.shape[0] > weight.shape[1] else _OTHER_ROWS
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if 0 < rows <= most and available and torch.backends.mkldnn.enabled:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return F.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


LINEAR = torch.ops.toca_fx.linear.default
