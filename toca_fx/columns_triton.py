"""The Triton kernel behind ``columns``: attention with the roles of queries and keys exchanged.

A program keeps a block of keys and runs over all queries, so that nothing is written but the sums, and each by one program only.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_KEYS = 64
_LOG2_E = tl.constexpr(1.4426950408889634)


def launch(query: Tensor, key: Tensor, logsumexp: Tensor, sums: Tensor, scale: float) -> None:
    """Write the column sums of [B, H, N, D] and [B, H, M, D] to ``sums`` [B, H, M], contiguous.

    ``logsumexp`` [B, H, N] is natural and in float32; all are on one device, the current one.
    """
    batch, heads, queries, width = query.shape
    keys, padded = key.shape[2], max(16, triton.next_power_of_2(width))
    # Keys and two blocks of queries have to fit into the shared memory of a small GPU.
    rows = 64 if query.element_size() * padded <= 256 else 32
    grid = (batch * heads, triton.cdiv(keys, _KEYS))  # the first may be as large as it likes
    kernel: Any = _column_sums
    kernel[grid](
        query,
        key,
        logsumexp,
        sums,
        scale,
        heads,
        queries,
        keys,
        width,
        *query.stride(),
        *key.stride(),
        *logsumexp.stride(),
        ROWS=rows,
        KEYS=_KEYS,
        WIDTH=padded,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _column_sums(  # type: ignore[no-untyped-def]
    query,
    key,
    logsumexp,
    sums,
    scale,
    heads,
    queries,
    keys,
    width,
    query_b,
    query_h,
    query_n,
    query_d,
    key_b,
    key_h,
    key_n,
    key_d,
    total_b,
    total_h,
    total_n,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    head = (tl.program_id(0) % heads).to(tl.int64)
    sample = (tl.program_id(0) // heads).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    channels = tl.arange(0, WIDTH)
    query += sample * query_b + head * query_h
    key += sample * key_b + head * key_h
    logsumexp += sample * total_b + head * total_h
    of_keys = (channels < width)[:, None] & (columns < keys)[None, :]
    k = tl.load(key + channels[:, None] * key_d + columns[None, :] * key_n, mask=of_keys, other=0.0)
    found = tl.zeros([KEYS], tl.float32)
    for start in range(0, queries, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        of_queries = (rows < queries)[:, None] & (channels < width)[None, :]
        q = tl.load(query + rows[:, None] * query_n + channels[None, :] * query_d, mask=of_queries, other=0.0)
        # Rows beyond the last have an infinite sum, and add nothing.
        normalizer = tl.load(logsumexp + rows * total_n, mask=rows < queries, other=float("inf"))
        logits = tl.dot(q, k, input_precision="ieee") * scale
        found += tl.sum(tl.exp2((logits - normalizer[:, None]) * _LOG2_E), 0)
    tl.store(sums + tl.program_id(0).to(tl.int64) * keys + columns, found, mask=columns < keys)
