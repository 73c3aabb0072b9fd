"""The kernel of s1: its numbers by Triton's interpreter, and what the compiler makes of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.marks import slow_but

ROOT = Path(__file__).resolve().parents[3]

# The kernel's numbers, by Triton's interpreter

# Prints the largest error of the columns, relative to their largest value, for every case.
SCRIPT = """
import json, sys, torch
from toca_fx.kernels import columns_triton
from toca_fx.kernels.columns import look_at

found = []
for (batch, heads, queries, keys, width), dtype, layout, every, config in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    shapes = [(batch, heads, queries, width), (batch, heads, keys, width)]
    if layout == "bnhd":  # as a projection leaves it
        query, key = (
            torch.randn(b, n, h, d, dtype=getattr(torch, dtype)).transpose(1, 2)
            for b, h, n, d in shapes
        )
    else:
        query, key = (torch.randn(shape, dtype=getattr(torch, dtype)) for shape in shapes)
    logits = query.double() @ key.double().transpose(2, 3) * 0.3
    # as from the efficient kernel
    total = torch.nn.functional.pad(logits.logsumexp(3).float(), (0, 5))[..., :queries]
    sums = torch.full((batch, heads, keys), torch.nan)
    config = columns_triton._tuned.configs[config]
    columns_triton.launch(look_at(query, every), key, look_at(total, every), sums, 0.3, config)
    expected = logits.softmax(3)[:, :, ::every].sum(2)
    found.append(float((sums - expected).abs().max() / expected.max()))
print(json.dumps(found))
"""

CASES = [
    ((1, 1, 16, 16, 16), "float32", "bhnd", 1, 4),
    ((2, 3, 100, 100, 72), "float32", "bnhd", 1, 4),  # the heads of DiT-XL/2; no block is whole
    ((2, 3, 100, 100, 72), "float32", "bnhd", 4, 4),  # 25 queries
    ((1, 2, 130, 70, 64), "float32", "bhnd", 3, 2),  # 44 queries, less than a block
    ((2, 1, 33, 65, 128), "float16", "bnhd", 1, 3),
    ((1, 2, 256, 300, 40), "float16", "bnhd", 2, 1),  # whole blocks of queries only
    ((1, 1, 70, 400, 128), "float32", "bhnd", 1, 0),
    ((1, 1, 5, 3, 96), "float32", "bhnd", 8, 2),  # one query
]


@pytest.fixture
def triton() -> Any:
    return pytest.importorskip("triton")


def test_the_kernel_sums_the_columns_of_the_map() -> None:
    # Triton 3.6 interprets `range` by int(array), which NumPy 2.4 refuses.
    pytest.importorskip("triton", minversion="3.7")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == len(CASES)
    assert all(error < 1e-5 for error in errors), errors


# What the compiler makes of it, for a GPU that need not be there


def compile_for(
    capability: tuple[int, int], dtype: torch.dtype, width: int, config: Any
) -> tuple[Any, dict[str, int]]:
    """The kernel as compiled for queries as projections leave them, and what it needs.

    That is registers per thread, bytes per thread that did not fit into them (the stack), and bytes
    of shared memory.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from toca_fx.kernels import columns_triton

    kernel = columns_triton._column_sums
    main, rest = columns_triton.parts(width)
    # A stride of 1 is a constant for Triton, and so is whether a number is a multiple of 16; that
    # of tokens may be any.
    constants = {**config.kwargs, "WIDTH": width, "MAIN": main, "REST": rest, "total_n": 1}
    pointer = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    pointers = {"query": pointer, "key": pointer, "logsumexp": "*fp32", "columns": "*fp32"}
    multiples = {*pointers, "query_b", "query_h", "query_n", "key_b", "key_h", "key_n"}
    types = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(
        kernel,
        {**types, "factor": "fp32"},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(kernel.arg_names)
            if name in multiples
        },
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) ", usage)
    assert found
    return compiled, {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": compiled.metadata.shared,
    }


HOPPER, AMPERE, ADA = (9, 0), (8, 0), (8, 9)

MOST_SHARED = {HOPPER: 232448, AMPERE: 166912, ADA: 101376}  # bytes that a block may have

HALF, FLOAT = torch.bfloat16, torch.float32


COMPILED = [
    *(
        (capability, dtype, width)
        for capability in (HOPPER, AMPERE)
        for dtype in (HALF, FLOAT)
        for width in (64, 72)
    ),
    *(
        (HOPPER, torch.float16, 128),
        (HOPPER, HALF, 128),
        (AMPERE, torch.float16, 128),
        (HOPPER, FLOAT, 96),
    ),
    *((HOPPER, HALF, 256), (ADA, HALF, 192), (ADA, FLOAT, 96)),
]


@pytest.mark.parametrize(
    ("capability", "dtype", "width"),
    slow_but(
        [(HOPPER, HALF, 128), (AMPERE, FLOAT, 64)],
        COMPILED,
        "of GPUs, precisions and widths, two are enough",
    ),
)
@pytest.mark.usefixtures("triton")
def test_no_warp_waits_for_others_sums_and_no_register_is_spilled(
    capability: tuple[int, int], dtype: torch.dtype, width: int
) -> None:
    from toca_fx.kernels.columns_triton import configurations

    for config in configurations(capability, dtype):
        compiled, needs = compile_for(capability, dtype, width, config)
        assert needs["stack"] == 0, (config, needs)
        assert needs["shared"] <= MOST_SHARED[capability], (config, needs)
        (loop,) = re.findall(r"scf\.for.*?scf\.yield", compiled.asm["ttgir"], re.DOTALL)
        layouts = re.findall(r"nvidia_mma<\{.*?warpsPerCTA = \[([^]]*)\]", compiled.asm["ttgir"])
        assert layouts
        assert set(layouts) == {f"{config.num_warps}, 1"}, (
            "each warp owns whole rows of keys x queries"
        )
        assert re.findall(r'"tt.reduce".*axis = (\d)', loop) == ["1"], "along the queries"
        assert "async_copy_global_to_local" in loop, "the next queries are on their way"
        # Nothing goes through shared memory from thread to thread, but for the second TF32 part of
        # the queries.
        assert loop.count("ttg.convert_layout") == 0
        assert ("wgmma.mma_async" in compiled.asm["ptx"]) == (capability == HOPPER)
        assert ("mma.sync" in compiled.asm["ptx"]) == (capability != HOPPER)


@pytest.mark.usefixtures("triton")
def test_two_blocks_share_a_multiprocessor_of_a_hopper_gpu() -> None:
    """While one of them waits for its products, the other takes exponentials: FLUX.1-dev and Wan,
    with 128 channels a head.
    """
    from toca_fx.kernels.columns_triton import configurations

    for config in configurations(HOPPER, HALF):
        _, needs = compile_for(HOPPER, HALF, 128, config)
        assert 2 * needs["registers"] * config.num_warps * 32 <= 65536
        assert 2 * (needs["shared"] + 1024) <= 233472


@pytest.mark.parametrize(("dtype", "width", "most"), [(FLOAT, 128, 512), (HALF, 256, 256)])
@pytest.mark.usefixtures("triton")
def test_the_widest_heads_still_fit_a_small_gpu(dtype: torch.dtype, width: int, most: int) -> None:
    from toca_fx.kernels.columns_triton import configurations

    for config in configurations(ADA, dtype):
        _, needs = compile_for(ADA, dtype, width, config)
        assert needs["shared"] <= MOST_SHARED[ADA]
        assert needs["stack"] <= most
