"""Column sums of an attention map in O(N) memory.

    columns[b, h, j] = sum_i exp(scale q_i . k_j - logsumexp_i)

They are made in plain PyTorch, or on a GPU by one operator together with the attention. The sum may
run over every n-th query i only: it is an estimate of the n-th part of the whole sum then, and as
scores are L2-normalised before they are compared, the factor does not matter.
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
_CUDNN = SDPBackend.CUDNN_ATTENTION.value
_FLASH = SDPBackend.FLASH_ATTENTION.value
_EFFICIENT = SDPBackend.EFFICIENT_ATTENTION.value
_MATH = SDPBackend.MATH.value


def score_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of scores: float64 for a tensor in float64, float32 for any other."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def look_at(tensor: Tensor, every: int) -> Tensor:
    """The queries 0, ``every``, 2 ``every``, ... as a view.

    [B, H, N, ...] -> [B, H, ceil(N / every), ...].
    """
    return tensor[:, :, ::every] if every > 1 else tensor


def column_sums(
    query: Tensor,
    key: Tensor,
    scale: float,
    logsumexp: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Columns [B, H, M] of queries [B, H, N, D] and keys [B, H, M, D], in chunks of queries.

    ``logsumexp`` [B, H, N] is that of scale q k^T, natural; it is computed where no kernel returned
    it. ``mask`` broadcasts to [B, H, N, M], and is boolean (True takes part) or added to the
    logits.
    """
    if query.device.type == "cpu":
        # Products in half precision are slow on many, and rounded logits would count.
        query, key = query.to(score_dtype(query)), key.to(score_dtype(key))
    columns = []
    for start in range(0, query.shape[2], _QUERY_CHUNK):
        rows = slice(start, start + _QUERY_CHUNK)
        logits = ((query[:, :, rows] * scale) @ key.transpose(-1, -2)).to(score_dtype(query))
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., rows, :]
            is_boolean = part.dtype == torch.bool
            logits = logits.masked_fill(~part, -torch.inf) if is_boolean else logits + part
        total = logits.logsumexp(-1) if logsumexp is None else logsumexp[:, :, rows]
        if mask is not None:
            # A query that may attend to nothing adds nothing.
            total = total.masked_fill(total == -torch.inf, 0.0)
        columns.append((logits - total.unsqueeze(-1)).exp().sum(dim=2))
    return torch.stack(columns).sum(0)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether ``attention_and_columns`` takes such operands.

    It runs on a GPU of NVIDIA's, where Triton is installed. A model on the device "meta" is
    explained as if it were there.
    """
    nbytes = query.shape[-1] * query.element_size()
    alike = all(
        operand.device.type in ("cuda", "meta")
        and operand.dtype == query.dtype
        and operand.stride(-1) == 1
        for operand in (query, key, value)
    )
    return (
        alike
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
    """Attention by the kernel that scaled_dot_product_attention would choose, with columns.

    Query [B, H, N, D], key [B, H, M, D], value [B, H, M, E] -> output [B, H, N, E], with heads next
    to channels in memory, and columns [B, H, M] in float32, of every ``every``-th query. ``read``
    [], boolean and on the CPU, says whether the columns are used afterwards: if not, they are zeros
    and only the attention is computed. Only the first call for sizes of an order of magnitude waits
    for the device (see ``columns_triton.launch``).
    """
    # The types are those of the graph: an autocast of the caller's was applied when that was made.
    with torch.autocast(query.device.type, enabled=False):
        if read is not None and not read:
            output, columns = F.scaled_dot_product_attention(query, key, value, scale=scale), None
        else:
            output, logsumexp = _attend(query, key, value, scale)
            totals = None if logsumexp is None else look_at(logsumexp, every)
            columns = _columns(look_at(query, every), key, scale, totals)
    # Heads next to channels in memory, as most kernels leave them by themselves; models may rely on
    # it with a view.
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    if columns is None:
        columns = key.new_zeros(key.shape[:3], dtype=torch.float32)
    return output, columns


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
    """The output [B, H, N, E], and the log-sum-exp [B, H, N] if torch's kernel returns one."""
    choice = _MATH
    if query.is_cuda:
        choice = aten._fused_sdp_choice.default(query, key, value, scale=scale)
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
    # Triton launches on the current device.
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        launch(query, key, logsumexp, columns, scale)
    return columns
