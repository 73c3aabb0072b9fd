"""The scores of tokens that an attention gives, s1 and s2 (ToCa, section 3.2).

    influence  s1_j = sum_i c_ij
               how much token j is attended to, in self- and joint attention
    entropy    H_i = - sum_k c_ik ln(c_ik + 1e-7)
               how undecided token i is about the text, in cross-attention

with the head-mean map c_ij = mean_h softmax(scale q_i . k_j). Both are normalised when tokens are
chosen: L2 over the tokens of one stream, s2 as 1 + H. s1 is made without an N x N map in memory, in
one of three ways, fastest first; all return the attention's output to rounding:

    in blocks   CPU, float32 or float64, a map of moderate size: softmax over blocks of queries
                that stay in the cache of the processor. Both products are those of the attention
                itself, so s1 costs a sum over the block. Of several blocks they take longer than
                the fused kernel does, which only s1 of most queries makes up for.
    fused       CPU otherwise, and CUDA: the fused kernel returns the row log-sum-exp, and a second
                product gives the columns; on CUDA in one operator (``columns``).
    recomputed  masks, causal or grouped attention, other devices: scaled_dot_product_attention as
                it is, and the log-sum-exp computed beside it.

With ``every`` above 1 the sum of s1 runs over the queries 0, ``every``, 2 ``every``, ... only: an
estimate of a part of s1 which is the same for all tokens, and so, once normalised, of s1. The map
of a cross-attention is small: it is computed, and the output from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from toca_fx.kernels.columns import attention_and_columns, column_sums, look_at, score_dtype, takes

aten = torch.ops.aten

# Elements of a map count heads and batch. A block is 16 MiB in float32, which a CPU's last cache
# holds; the map of a cross-attention is 256 MiB at most.
_BLOCK_ELEMENTS = 2**22
_MOST_BLOCKS = 16
_SPARSE = 2  # from every third query on the second product is cheaper than several blocks are
_MAP_ELEMENTS = 2**26


def normalize(score: Tensor) -> Tensor:
    """L2-normalise over tokens: [B, N] -> [B, N]."""
    length: Tensor = torch.linalg.vector_norm(score, dim=-1, keepdim=True)
    return score / length.clamp(min=1e-12)


def of_segment(values: Tensor, start: int, count: int) -> Tensor:
    """The scores of one stream's tokens out of those of all keys: [B, M] -> [B, count].

    They are L2-normalised among themselves.
    """
    return normalize(values[:, start : start + count])


def feature_norm(feature: Tensor) -> Tensor:
    """Head-mean L2 norm of keys or values: [B, H, N, D] -> [B, N]."""
    norm: Tensor = torch.linalg.vector_norm(feature.to(score_dtype(feature)), dim=-1).mean(dim=1)
    return norm


def smallness(feature: Tensor) -> Tensor:
    """Sum over the heads of 1 less the L2 norm of keys or values: [B, H, N, D] -> [B, N] (DuCa)."""
    norm: Tensor = torch.linalg.vector_norm(feature.to(score_dtype(feature)), dim=-1)
    return (1 - norm).sum(dim=1)


def map_influence(weights: Tensor, every: int = 1) -> Tensor:
    """s1 of an attention map, by every ``every``-th query: [B, H, N, M] -> [B, M]."""
    return look_at(weights, every).to(score_dtype(weights)).mean(dim=1).sum(dim=1)


def map_entropy(weights: Tensor, share: float) -> Tensor:
    """H of an attention map: [B, H, N, M] -> [B, N]; ``share`` scales the map beforehand."""
    return _entropy(weights.to(score_dtype(weights)).mean(dim=1), share)


def _entropy(mean: Tensor, share: float) -> Tensor:
    mean = mean * share if share != 1 else mean
    return -(mean * (mean + 1e-7).log()).sum(dim=-1)


def attention_and_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``scaled_dot_product_attention``, and H of its queries.

    Query [B, H, N, D], key [B, H, M, D], value [B, H, M, E] -> [B, H, N, E] and [B, N]. ``share``
    scales the map before the logarithm: 0.5 for a half of a guidance batch, whose two halves'
    entropies then sum to that of the concatenated maps.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    groups = query.shape[1] // key.shape[1]
    many = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] > _MAP_ELEMENTS
    if many or dropout_p or is_causal:
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return output, entropy(query, key, factor, attn_mask, share)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = _softmax((query * factor) @ key.transpose(-1, -2), attn_mask)
    # The fused kernels leave heads next to channels in memory; models may rely on it with a view.
    output = (weights.to(value.dtype) @ value).transpose(1, 2).contiguous().transpose(1, 2)
    return output, map_entropy(weights, share)


def entropy(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None, share: float = 1.0
) -> Tensor:
    """H [B, N] of a cross-attention, head by head: the memory of one head's map."""
    total: Tensor | None = None
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    for head in range(heads):
        own = slice(head, head + 1)
        part = mask if mask is None or mask.dim() < 4 or mask.shape[1] == 1 else mask[:, own]
        keys = key[:, head // groups : head // groups + 1]
        weights = _softmax((query[:, own] * scale) @ keys.transpose(-1, -2), part)
        total = weights if total is None else total + weights
    if total is None:
        raise ValueError("an attention without heads")
    return _entropy(total.squeeze(1) / heads, share)


def _softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    logits = logits.to(score_dtype(logits))
    if mask is not None:
        # A query that may attend to nothing gets zeros, as from the fused kernels; softmax would
        # make it NaN.
        is_boolean = mask.dtype == torch.bool
        logits = logits.masked_fill(~mask, -torch.inf) if is_boolean else logits + mask
        return logits.softmax(-1).masked_fill(logits.amax(-1, keepdim=True) == -torch.inf, 0.0)
    return logits.softmax(-1)


def attention_and_influence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    every: int = 1,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``scaled_dot_product_attention``, and s1 of its keys, not normalised.

    Query [B, H, N, D], key [B, H, M, D], value [B, H, M, E] -> [B, H, N, E] and [B, M]. s1 is what
    every ``every``-th query adds to it. ``read`` [], a boolean on the CPU, says whether s1 is used
    afterwards: where it is not, the operator for CUDA returns zeros in its stead. The other ways
    ignore ``read``.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    plain = (
        attn_mask is None
        and not dropout_p
        and not is_causal
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
    )
    if plain and query.device.type == "cpu":
        if query.dtype in (torch.float32, torch.float64):
            blocks = _blocks(query, key, every)
            if blocks is not None:
                return _in_blocks(query, key, value, factor, every, *blocks)
        if query.shape[-1] == value.shape[-1]:
            output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu.default(
                query, key, value, scale=scale
            )
            return output, influence(query, key, factor, logsumexp, every=every)
    if plain and takes(query, key, value):
        output, columns = attention_and_columns(query, key, value, factor, every, read)
        return output, columns.mean(dim=1)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if is_causal:
        every_pair = (query.shape[2], key.shape[2])
        attn_mask = torch.ones(every_pair, dtype=torch.bool, device=query.device).tril()
    return output, influence(query, key, factor, None, attn_mask, every)


def _blocks(query: Tensor, key: Tensor, every: int) -> tuple[int, int] | None:
    """How many samples, and queries of each, have a map that stays in the cache.

    Blocks are whole maps as long as one fits: a product of few queries with all keys, for many
    samples, is slow. There are few numbers of blocks, as each is a graph of its own. None if there
    would be more than a graph should have, or than are worth it for every ``every``-th query.
    """
    batch, heads, queries, _ = query.shape
    of_sample = max(1, heads * key.shape[2] * queries)
    if batch * of_sample <= _BLOCK_ELEMENTS:
        return batch, queries
    most = (1 if every > _SPARSE else _MOST_BLOCKS) // max(1, batch)
    for down in (1, 2, 4, 8, 16):
        if of_sample <= down * _BLOCK_ELEMENTS and down <= most:
            return 1, -(queries // -down)
    return None


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, every: int, samples: int, rows: int
) -> tuple[Tensor, Tensor]:
    outputs, columns = [], []
    batch, _, queries, _ = query.shape
    split = (_split(operand, samples, batch, 0) for operand in (query, key, value))
    for q, k, v in zip(*split, strict=True):
        parts = [
            _of_block(part * scale, k, v, every, -at * rows % every)
            for at, part in enumerate(_split(q, rows, queries, 2))
        ]
        outputs.append(torch.cat([output for output, _ in parts], dim=2))
        columns.append(torch.stack([column for _, column in parts]).sum(0))
    # The fused kernels leave heads next to channels in memory; models may rely on it with a view.
    output = torch.cat(outputs).transpose(1, 2).contiguous().transpose(1, 2)
    return output, torch.cat(columns) / query.shape[1]


def _split(operand: Tensor, size: int, whole: int, dim: int) -> Sequence[Tensor]:
    # A graph that names no size is right for others too.
    return (operand,) if size >= whole else torch.split(operand, size, dim)


def _of_block(
    query: Tensor, key: Tensor, value: Tensor, every: int, first: int
) -> tuple[Tensor, Tensor]:
    """Output and columns [B, M] of a block of queries.

    The columns are those of the queries ``first``, ``first`` + ``every``, ...
    """
    logits = query @ key.transpose(-1, -2)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    reciprocal = weights.sum(-1, keepdim=True).reciprocal()
    output = (weights @ value) * reciprocal
    if every > 1:
        weights, reciprocal = weights[:, :, first::every], reciprocal[:, :, first::every]
    return output, (weights * reciprocal).sum(dim=(1, 2))


def influence(
    query: Tensor,
    key: Tensor,
    scale: float,
    logsumexp: Tensor | None = None,
    mask: Tensor | None = None,
    every: int = 1,
) -> Tensor:
    """s1 [B, M] by a second product, in chunks of queries, which takes memory O(N).

    The arguments are those of ``column_sums``; every ``every``-th query counts.
    """
    if mask is not None and mask.shape[-2] > 1:
        mask = mask[..., ::every, :]
    if logsumexp is not None:
        logsumexp = look_at(logsumexp, every)
    return column_sums(look_at(query, every), key, scale, logsumexp, mask).mean(dim=1)
