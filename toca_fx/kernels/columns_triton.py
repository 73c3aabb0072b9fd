"""The Triton kernel for column sums of an attention map.

It is the first half of an attention, with the roles of queries and keys exchanged. A program keeps
a block of keys and runs over all queries, so that nothing is written but the sums, and each by one
program only. Of the block of the map, keys x queries, each warp owns whole rows: it sums them up
without the other warps, and waits for the queries only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)


def _tiles(keys: int, rows: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"KEYS": keys, "ROWS": rows}, num_warps=warps, num_stages=stages)


# tests/system/kernels/test_columns.py compiles all of these and looks at instructions, registers
# and shared memory. The wide ones are for the matrix instructions of Hopper and Blackwell;
# elsewhere warps would share the rows of a block that is less tall. In float32 each operand becomes
# two in registers.
_WIDE = [_tiles(256, 64, 8, 3), _tiles(128, 64, 8, 3), _tiles(64, 64, 4, 3)]
_TALL = [_tiles(128, 32, 4, 3), _tiles(64, 16, 4, 2)]
_SINGLE = _TALL[-1:]
_tuning = threading.Lock()  # Triton's autotuner keeps the call that it works on in itself


def configurations(capability: tuple[int, int], dtype: torch.dtype) -> list[triton.Config]:
    """What is worth trying on a device of this compute capability, 8.0 or later."""
    if dtype == torch.float32:
        return _SINGLE
    return _WIDE if capability[0] in (9, 10) else _TALL


def parts(width: int) -> tuple[int, int]:
    """Channels as one or two powers of two, to pad as few as possible.

    72 -> 64 + 16, 96 -> 64 + 32, 128 -> 128 + 0.
    """
    main = max(16, 1 << (width.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(width - main)) if width > main else 0
    return (main, rest) if rest < main else (2 * main, 0)


def launch(
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor,
    columns: Tensor,
    scale: float,
    config: triton.Config | None = None,
) -> None:
    """Write the column sums of queries [B, H, N, D] and keys [B, H, M, D] to ``columns``.

    ``columns`` [B, H, M] is float32 and contiguous, ``logsumexp`` [B, H, N] natural and in float32;
    channels of queries and keys have a stride of 1. All are on one device, the current one. Without
    ``config`` it is the fastest of ``configurations``, which is found at the first call for sizes
    of this order: that call waits for the device, unless what it finds is on disk already, and
    cannot be recorded into a CUDA graph.
    """
    batch, heads, rows, width = query.shape
    keys = key.shape[2]
    main, rest = parts(width)
    capability = torch.cuda.get_device_capability(query.device) if config is None else (0, 0)
    possible = configurations(capability, query.dtype) if config is None else [config]
    magnitudes = f"{rows.bit_length():02}{(batch * heads * keys).bit_length():02}"
    problem = int(f"{capability[0]}{capability[1]}{magnitudes}")
    arguments = (
        *(query, key, logsumexp, columns, scale * _LOG2_E.value, heads, rows, keys),
        *(*query.stride()[:3], *key.stride()[:3], *logsumexp.stride()),
        problem,
    )
    constants = {"WIDTH": width, "MAIN": main, "REST": rest}

    def grid(given: dict[str, Any]) -> tuple[int]:
        programs: int = batch * heads * triton.cdiv(keys, given["KEYS"])
        return (programs,)  # one axis: the others end at 65535

    kernel: Any = _column_sums if len(possible) == 1 else _tuned
    chosen = possible[0].all_kwargs() if len(possible) == 1 else {}
    with _tuning:
        kernel[grid](*arguments, **constants, **chosen)


@triton.jit(do_not_specialize=["problem"])  # type: ignore[untyped-decorator]
def _column_sums(  # type: ignore[no-untyped-def]
    query,
    key,
    logsumexp,
    columns,
    factor,
    heads,
    queries,
    keys,
    query_b,
    query_h,
    query_n,
    key_b,
    key_h,
    key_n,
    total_b,
    total_h,
    total_n,
    problem,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sums of a block of keys; ``factor`` is scale * log2(e).

    ``problem`` is not used here: tuning tells devices and orders of magnitude apart by it.
    """
    blocks = tl.cdiv(keys, KEYS)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    query += (pair // heads) * query_b + (pair % heads) * query_h
    key += (pair // heads) * key_b + (pair % heads) * key_h
    logsumexp += (pair // heads) * total_b + (pair % heads) * total_h
    k = _load(key, at, key_n, at < keys, 0, MAIN, WIDTH, True)
    k_rest = _load(key, at, key_n, at < keys, MAIN, REST, WIDTH, True) if REST else k
    index = tl.arange(0, ROWS).to(tl.int64)
    sums = tl.zeros([KEYS], tl.float32)
    step = tl.full([], ROWS, tl.int64)
    whole = queries // ROWS * ROWS
    for _ in range(0, whole, ROWS):
        sums += _of_block(
            k,
            k_rest,
            query,
            index,
            query_n,
            logsumexp,
            total_n,
            ROWS,
            factor,
            WIDTH,
            MAIN,
            REST,
            False,
        )
        query += step * query_n
        logsumexp += step * total_n
    if whole < queries:
        sums += _of_block(
            k,
            k_rest,
            query,
            index,
            query_n,
            logsumexp,
            total_n,
            queries - whole,
            factor,
            WIDTH,
            MAIN,
            REST,
            True,
        )
    tl.store(columns + pair * keys + at, sums, mask=at < keys)


@triton.jit  # type: ignore[untyped-decorator]
def _of_block(  # type: ignore[no-untyped-def]
    k,
    k_rest,
    query,
    index,
    query_n,
    logsumexp,
    total_n,
    rows,
    factor,
    WIDTH: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    CUT: tl.constexpr,
):
    """What one block of queries, of which ``rows`` are there if it is cut off, adds to the sums."""
    # Ahead of the products, behind which its latency hides. Rows beyond the last have an infinite
    # total, and add nothing.
    totals = logsumexp + index * total_n
    total = tl.load(totals, mask=index < rows, other=float("inf")) if CUT else tl.load(totals)
    q = _load(query, index, query_n, index < rows, 0, MAIN, WIDTH, CUT)
    # float32 is multiplied as three products of parts in TF32, as the memory-efficient attention
    # does it: what is left out is 2^-21 of a product. Half precision ignores the word.
    logits = tl.dot(k, tl.trans(q), input_precision="tf32x3")
    if REST:
        q_rest = _load(query, index, query_n, index < rows, MAIN, REST, WIDTH, CUT)
        logits = tl.dot(k_rest, tl.trans(q_rest), logits, input_precision="tf32x3")
    return tl.sum(tl.exp2(tl.fma(logits, factor, -(total * _LOG2_E)[None, :])), 1)


@triton.jit  # type: ignore[untyped-decorator]
def _load(  # type: ignore[no-untyped-def]
    pointer,
    rows,
    stride,
    there,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    CUT: tl.constexpr,
):
    """Channels FIRST to FIRST + COUNT of rows, with zeros beyond WIDTH.

    With CUT, rows may be missing (``there`` is false), and are zeros too. Loads have no mask that
    they do not need.
    """
    channels = FIRST + tl.arange(0, COUNT)
    pointers = pointer + rows[:, None] * stride + channels[None, :]
    if CUT and FIRST + COUNT > WIDTH:
        block = tl.load(pointers, mask=there[:, None] & (channels < WIDTH)[None, :], other=0.0)
    elif CUT:
        block = tl.load(pointers, mask=there[:, None], other=0.0)
    elif FIRST + COUNT > WIDTH:
        block = tl.load(pointers, mask=(channels < WIDTH)[None, :], other=0.0)
    else:
        block = tl.load(pointers)
    return block


def _suitable(
    configs: Sequence[triton.Config], given: dict[str, Any], **_: Any
) -> list[triton.Config]:
    query = given["query"]
    possible = configurations(torch.cuda.get_device_capability(query.device), query.dtype)
    return [config for config in configs if config in possible]


def _milliseconds(run: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """The median time of some runs on the device, in ms, once per quantile.

    Triton's own way of measuring takes 256 MiB, and longer.
    """
    times = []
    for _ in range(6):
        began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return [sorted(times[1:])[2]] * len(quantiles)  # the first run may have loaded the kernel


_tuned = triton.autotune(
    configs=[*_WIDE, *_TALL],
    key=["WIDTH", "problem"],
    prune_configs_by={"early_config_prune": _suitable},
    do_bench=_milliseconds,
    cache_results=True,
)(_column_sums)
