"""Column sums of an attention map in O(N) memory: in plain PyTorch, and on a GPU as one operator
with the attention itself.

columns[b, h, j] = sum_i exp(scale q_i . k_j - logsumexp_i)

The sum runs over the queries i that are looked at. Where those are every n-th only, it is an
estimate of the n-th part of the whole sum: scores are L2-normalised before they are compared, so
the factor does not matter.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

aten = torch.ops.aten

_QUERY_CHUNK = 512
_KERNEL_BYTES = 512  # of a query, for one head: more does not fit into a GPU's shared memory
_CUDNN, _FLASH, _EFFICIENT, _MATH = (
    backend.value
    for backend in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    )
)


def score_dtype(tensor: Tensor) -> torch.dtype:
    """Scores of a float64 model are float64, of every other float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def look_at(tensor: Tensor, every: int) -> Tensor:
    """The queries that are looked at, 0, ``every``, 2 ``every``, ...: [B, H, N, ...] -> [B, H,
    ceil(N / every), ...], a view.
    """
    return tensor[:, :, ::every] if every > 1 else tensor


def column_sums(
    query: Tensor,
    key: Tensor,
    scale: float,
    logsumexp: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Columns [B, H, M] of [B, H, N, D] queries and [B, H, M, D] keys, summed over chunks of all
    the N queries given.

    ``logsumexp`` [B, H, N], natural, of scale q k^T is computed where no kernel returned it;
    ``mask`` broadcasts to [B, H, N, M], boolean (True takes part) or added to the logits.
    """
    if (
        query.device.type == "cpu"
    ):  # products in half precision are slow on many, and rounded logits would count
        query, key = query.to(score_dtype(query)), key.to(score_dtype(key))
    columns = []
    for start in range(0, query.shape[2], _QUERY_CHUNK):
        rows = slice(start, start + _QUERY_CHUNK)
        logits = ((query[:, :, rows] * scale) @ key.transpose(-1, -2)).to(score_dtype(query))
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., rows, :]
            logits = (
                logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part
            )
        total = logits.logsumexp(-1) if logsumexp is None else logsumexp[:, :, rows]
        if mask is not None:
            total = total.masked_fill(
                total == -torch.inf, 0.0
            )  # a query that may attend to nothing adds nothing
        columns.append((logits - total.unsqueeze(-1)).exp().sum(dim=2))
    return torch.stack(columns).sum(0)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``attention_and_columns`` is made for such operands: on a GPU of NVIDIA's, where
    Triton is installed.

    A model on the device "meta" is explained as if it were there.
    """
    operands, nbytes = (query, key, value), query.shape[-1] * query.element_size()
    return (
        all(
            operand.device.type in ("cuda", "meta")
            and operand.dtype == query.dtype
            and operand.stride(-1) == 1
            for operand in operands
        )
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and nbytes % 16 == 0
        and nbytes <= _KERNEL_BYTES
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
    )


@torch.library.custom_op("toca_fx::attention_and_columns", mutates_args=())
def attention_and_columns(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    every: int = 1,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by the kernel that scaled_dot_product_attention would choose, and the columns of
    its map.

    Nothing waits for the device, but in the first call for sizes of an order (see
    ``columns_triton.launch``). Query [B, H, N, D], key [B, H, M, D], value [B, H, M, E] -> output
    [B, H, N, E], with heads next to channels in memory, and columns [B, H, M] in float32, of every
    ``every``-th query. ``read`` [], boolean and on the CPU, says whether anybody will read the
    columns: if not, they are zeros and only the attention is computed.
    """
    # The types are those of the graph: an autocast of the caller's was applied when that was made.
    with torch.autocast(query.device.type, enabled=False):
        if read is not None and not read:
            output, columns = F.scaled_dot_product_attention(query, key, value, scale=scale), None
        else:
            output, logsumexp = _attend(query, key, value, scale)
            columns = _columns(
                look_at(query, every),
                key,
                scale,
                None if logsumexp is None else look_at(logsumexp, every),
            )
    # Heads next to channels in memory, as most kernels leave them by themselves; models may rely on
    # it with a view.
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return output, key.new_zeros(key.shape[:3], dtype=torch.float32) if columns is None else columns


@attention_and_columns.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    every: int = 1,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    output = value.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    return output, key.new_empty(key.shape[:3], dtype=torch.float32)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Output, and the log-sum-exp [B, H, N] if the kernel that these operands get here and now
    returns one.
    """
    choice = torch._fused_sdp_choice(query, key, value, scale=scale) if query.is_cuda else _MATH
    if choice == _CUDNN:
        output, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention.default(
            query, key, value, None, True, scale=scale
        )
        # [B, H, N] in some versions of torch, [B, H, N, 1] in others.
        return output, logsumexp if logsumexp.dim() == 3 else logsumexp.squeeze(3)
    if choice == _FLASH:
        output, logsumexp, *_ = aten._scaled_dot_product_flash_attention.default(
            query, key, value, scale=scale
        )
        return output, logsumexp
    if choice == _EFFICIENT:
        output, logsumexp, *_ = aten._scaled_dot_product_efficient_attention.default(
            query, key, value, None, True, scale=scale
        )
        return output, logsumexp.narrow(2, 0, query.shape[2])  # it is padded
    return F.scaled_dot_product_attention(query, key, value, scale=scale), None


def _columns(query: Tensor, key: Tensor, scale: float, logsumexp: Tensor | None) -> Tensor:
    """Columns [B, H, M] of all queries given: by the kernel where there is one."""
    # Before Ampere Triton has no matrix instructions, and the kernel would spill kilobytes of
    # registers.
    if logsumexp is None or torch.cuda.get_device_capability(query.device) < (8, 0):
        return column_sums(query, key, scale, logsumexp)
    from toca_fx.kernels.columns_triton import launch

    columns = torch.empty(key.shape[:3], dtype=torch.float32, device=key.device)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        launch(query, key, logsumexp, columns, scale)
    return columns
