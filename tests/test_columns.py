"""s1 on a GPU: the kernel by Triton's interpreter, and the operators in the graph on fake tensors of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from toca_fx import attention, columns
from toca_fx.flops import count_flops

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten

# Prints the largest error of s1, relative to its largest value, for every case.
SCRIPT = """
import json, sys, torch
from toca_fx.columns import column_sums

found = []
for batch, heads, queries, keys, width, dtype, layout in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    shapes = [(batch, heads, queries, width), (batch, heads, keys, width)]
    if layout == "bnhd":  # as a projection leaves it
        query, key = (torch.randn(b, n, h, d, dtype=getattr(torch, dtype)).transpose(1, 2) for b, h, n, d in shapes)
    else:
        query, key = (torch.randn(shape, dtype=getattr(torch, dtype)) for shape in shapes)
    logits = query.double() @ key.double().transpose(2, 3) * 0.3
    padded = torch.nn.functional.pad(logits.logsumexp(3).float(), (0, 5))[..., :queries]  # as from the efficient kernel
    sums = column_sums(query, key, padded, 0.3)
    assert sums.dtype == torch.float32 and sums.shape == (batch, heads, keys)
    expected = logits.softmax(3).sum(2)
    found.append(float((sums - expected).abs().max() / expected.max()))
print(json.dumps(found))
"""
CASES = [
    (1, 1, 16, 16, 16, "float32", "bhnd"),
    (2, 3, 100, 100, 72, "float32", "bnhd"),  # the heads of DiT-XL/2; no block is whole
    (1, 2, 130, 70, 64, "float32", "bhnd"),
    (2, 1, 33, 65, 128, "float16", "bnhd"),
    (1, 1, 70, 40, 128, "float32", "bhnd"),  # blocks of 32 rows
]


def test_the_kernel_sums_the_columns_of_the_map() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == len(CASES)
    assert all(error < 1e-5 for error in errors), errors


FLASH, EFFICIENT = aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default


def on_gpu(dtype: torch.dtype, width: int) -> list[torch.Tensor]:
    """Fake q, k and v as projections leave them, [2, 3, 50, width]; to be called in a fake mode."""
    return [torch.empty(2, 50, 3, width, dtype=dtype, device="cuda").transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize(
    ("dtype", "flash", "kernel"),
    [(torch.float16, True, FLASH), (torch.bfloat16, True, FLASH), (torch.float16, False, EFFICIENT), (torch.float32, True, EFFICIENT)],
)
def test_a_gpu_takes_a_fused_kernel_and_the_operator(
    dtype: torch.dtype, flash: bool, kernel: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(attention, "_has_flash", lambda device: flash)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return attention.attention_and_influence(query, key, value)

    with FakeTensorMode():
        traced = make_fx(attend, tracing_mode="fake", pre_dispatch=True)(*on_gpu(dtype, 72))
    found = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    products = {FLASH, EFFICIENT, torch.ops.toca_fx.column_sums.default, aten.matmul.default, aten.bmm.default}
    assert [target for target in found if target in products] == [kernel, torch.ops.toca_fx.column_sums.default]
    output, score = (node.meta["val"] for node in next(iter(traced.graph.find_nodes(op="output"))).args[0])
    assert (tuple(output.shape), output.dtype) == ((2, 3, 50, 72), dtype)
    assert (tuple(score.shape), score.dtype) == ((2, 50), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "width", "flash"),
    [
        (torch.float16, 65, True),  # rows that are not aligned
        (torch.float64, 64, True),
        (torch.bfloat16, 64, False),  # before Ampere no fused kernel takes it
        (torch.float32, 256, True),  # more than the kernel's shared memory
    ],
)
def test_what_no_fused_kernel_takes_is_recomputed(dtype: torch.dtype, width: int, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_has_flash", lambda device: flash)
    with FakeTensorMode():
        assert attention._fused_on_gpu(*on_gpu(dtype, width), None) is None


def test_operands_of_several_types_are_left_to_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_has_flash", lambda device: True)
    with FakeTensorMode():
        query, key, value = on_gpu(torch.float32, 64)
        assert attention._fused_on_gpu(query, key, value, None) is not None
        assert attention._fused_on_gpu(query, key, value.half(), None) is None


def test_its_work_is_one_more_product() -> None:
    def score(query: torch.Tensor, key: torch.Tensor, logsumexp: torch.Tensor) -> torch.Tensor:
        return columns.column_sums(query, key, logsumexp, 0.3)

    with FakeTensorMode():
        inputs = [torch.empty(2, 3, 50, 8, device="cuda"), torch.empty(2, 3, 40, 8, device="cuda"), torch.empty(2, 3, 50, device="cuda")]
        traced = make_fx(score, tracing_mode="fake")(*inputs)
        assert sum(count_flops(traced, inputs).values()) == 2 * 2 * 3 * 50 * 40 * 8
