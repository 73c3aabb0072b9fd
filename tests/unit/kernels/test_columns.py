"""s1 on a GPU: the operator's choices on fake tensors, and its numbers on the CPU."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend

from tests.made_up_cuda import made_up_cuda
from toca_fx.kernels import columns
from toca_fx.kernels import influence as attention
from toca_fx.kernels.columns import attention_and_columns, column_sums, takes
from toca_fx.lower.flops import columns_flops, count_flops

aten = torch.ops.aten

OPERATOR = torch.ops.toca_fx.attention_and_columns.default


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H100 that is not there, for fake tensors."""
    monkeypatch.setattr(columns.importlib.util, "find_spec", lambda name: object())
    with made_up_cuda(), FakeTensorMode():
        yield


@pytest.fixture
def triton() -> Any:
    return pytest.importorskip("triton")


HOPPER, AMPERE, ADA = (9, 0), (8, 0), (8, 9)

HALF, FLOAT = torch.bfloat16, torch.float32


@pytest.mark.usefixtures("triton")
def test_channels_are_padded_as_little_as_possible() -> None:
    from toca_fx.kernels.columns_triton import parts

    found = {width: parts(width) for width in (8, 16, 24, 40, 64, 72, 80, 96, 112, 128, 160, 256)}
    assert found == {
        **{
            8: (16, 0),
            16: (16, 0),
            24: (32, 0),
            40: (32, 16),
            64: (64, 0),
            72: (64, 16),
            80: (64, 16),
            96: (64, 32),
            112: (128, 0),
        },
        **{128: (128, 0), 160: (128, 32), 256: (256, 0)},
    }


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("capability", "dtype", "tried"),
    [(HOPPER, HALF, 3), (ADA, HALF, 2), (HOPPER, FLOAT, 0), ((12, 0), HALF, 2)],
)
def test_the_fastest_configuration_is_found_once_for_sizes_of_an_order(
    capability: tuple[int, int],
    dtype: torch.dtype,
    tried: int,
    triton: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from toca_fx.kernels import columns_triton

    launched: list[dict[str, Any]] = []
    timed: list[object] = []

    def launch(*args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        bound = inspect.signature(columns_triton._column_sums.fn).bind(
            *args,
            **{
                name: value
                for name, value in kwargs.items()
                if name not in ("num_warps", "num_stages", "num_ctas", "maxnreg")
            },
        )
        launched.append({**bound.arguments, "grid": grid(kwargs)})

    def time(run: Any, quantiles: Any) -> list[float]:
        run()
        timed.append(launched.pop()["ROWS"])
        return [float(len(timed) == 1)] * 3  # the first one is slow

    monkeypatch.setattr(columns_triton._column_sums, "run", launch)
    monkeypatch.setattr(columns_triton._tuned, "do_bench", time)
    monkeypatch.setattr(columns_triton._tuned, "cache", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for tokens in (1000, 1020, 900):
        query, key = (
            torch.empty(2, tokens, 3, 72, dtype=dtype, device="cuda").transpose(1, 2)
            for _ in range(2)
        )
        total, sums = (torch.empty(2, 3, tokens, device="cuda") for _ in range(2))
        columns_triton.launch(query[:, :, ::4], key, total[:, :, ::4], sums, 0.3)
    assert len(timed) == tried
    assert [call["queries"] for call in launched] == [250, 255, 225]
    assert [call["query_n"] for call in launched] == [4 * 3 * 72] * 3
    assert [call["total_n"] for call in launched] == [4] * 3
    assert all(call["grid"] == (6 * -(call["keys"] // -call["KEYS"]),) for call in launched)
    assert len({call["KEYS"] for call in launched}) == 1


# The operator


def on_gpu(dtype: torch.dtype, width: int) -> list[Tensor]:
    """Fake q, k and v as projections leave them, [2, 3, 50, width]; to be called in a fake mode."""
    return [
        torch.empty(2, 50, 3, width, dtype=dtype, device="cuda").transpose(1, 2) for _ in range(3)
    ]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_a_gpu_the_operator_takes_the_place_of_the_attention(dtype: torch.dtype) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        return attention.attention_and_influence(query, key, value, scale=0.3, every=4, read=read)

    traced = make_fx(attend, tracing_mode="fake", pre_dispatch=True)(
        *on_gpu(dtype, 72), torch.ones((), dtype=torch.bool)
    )
    operator, mean = (
        node
        for node in traced.graph.nodes
        if node.op == "call_function" and "getitem" not in node.name
    )
    assert (operator.target, mean.target) == (OPERATOR, aten.mean.dim)
    assert operator.args == (
        *traced.graph.find_nodes(op="placeholder")[:3],
        0.3,
        4,
        traced.graph.find_nodes(op="placeholder")[3],
    )
    output, score = (
        node.meta["val"] for node in next(iter(traced.graph.find_nodes(op="output"))).args[0]
    )
    assert (tuple(output.shape), output.dtype) == ((2, 3, 50, 72), dtype)
    assert output.transpose(1, 2).is_contiguous()
    assert (tuple(score.shape), score.dtype) == ((2, 50), torch.float32)


@pytest.mark.usefixtures("device")
def test_what_the_operator_does_not_take() -> None:
    query, key, value = on_gpu(torch.float32, 64)
    assert takes(query, key, value)
    assert takes(query, key, value[..., :32])
    assert not takes(query, key, value.half()), "operands of several types are left to autocast"
    assert not takes(query, key, value.mT.contiguous().mT)
    assert not takes(query.cpu(), key.cpu(), value.cpu())
    for dtype, width in (
        (torch.float16, 65),
        (torch.float64, 64),
        (torch.float32, 256),
    ):  # rows not aligned; too wide
        assert not takes(*on_gpu(dtype, width))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": True}, {"dropout_p": 0.5}])
def test_masks_and_dropout_are_done_beside_the_attention(options: dict[str, Any]) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        mask = (
            {"attn_mask": torch.ones(50, 50, dtype=torch.bool, device="cuda")}
            if "attn_mask" in options
            else {}
        )
        return attention.attention_and_influence(query, key, value, **{**options, **mask})

    traced = make_fx(attend, tracing_mode="fake", pre_dispatch=True)(*on_gpu(torch.float16, 64))
    targets = [node.target for node in traced.graph.nodes]
    assert aten.scaled_dot_product_attention.default in targets
    assert OPERATOR not in targets


CUDNN = aten._scaled_dot_product_cudnn_attention.default

FLASH, EFFICIENT = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
)

BY_CHOICE = {
    SDPBackend.CUDNN_ATTENTION: CUDNN,
    SDPBackend.FLASH_ATTENTION: FLASH,
    SDPBackend.EFFICIENT_ATTENTION: EFFICIENT,
}


@pytest.fixture
def launched(device: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the kernel was launched with, on the device."""
    columns_triton = pytest.importorskip("toca_fx.kernels.columns_triton")
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(columns_triton, "launch", lambda *args: calls.append(args))
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    return calls


def run(read: bool | None, dtype: torch.dtype, every: int = 1) -> tuple[list[Any], Tensor, Tensor]:
    """The operator itself on fake tensors: the operators that it calls, and what it returns."""
    told = None if read is None else torch.tensor(read)

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return attention_and_columns._init_fn(query, key, value, 0.3, every, told)

    traced = make_fx(call, tracing_mode="fake", pre_dispatch=True)(*on_gpu(dtype, 72))
    output, sums = (
        node.meta["val"] for node in next(iter(traced.graph.find_nodes(op="output"))).args[0]
    )
    return [node.target for node in traced.graph.nodes if node.op == "call_function"], output, sums


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("choice", BY_CHOICE)
def test_the_log_sum_exp_is_that_of_the_kernel_which_would_have_been_chosen(
    choice: SDPBackend, every: int, launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aten._fused_sdp_choice, "default", lambda *args, **kwargs: choice.value)
    targets, output, sums = run(
        None, torch.float32 if choice is SDPBackend.EFFICIENT_ATTENTION else torch.bfloat16, every
    )
    assert [target for target in targets if target in BY_CHOICE.values()] == [BY_CHOICE[choice]]
    assert output.transpose(1, 2).is_contiguous()
    ((query, key, logsumexp, into, scale),) = launched
    looked_at = -(50 // -every)
    assert (tuple(query.shape), tuple(key.shape), tuple(logsumexp.shape)) == (
        (2, 3, looked_at, 72),
        (2, 3, 50, 72),
        (2, 3, looked_at),
    )
    assert (query.stride(2), scale) == (every * 3 * 72, 0.3)
    assert (tuple(sums.shape), sums.dtype, into.is_contiguous()) == (
        (2, 3, 50),
        torch.float32,
        True,
    )


@pytest.mark.parametrize(
    ("choice", "capability"), [(SDPBackend.MATH, HOPPER), (SDPBackend.EFFICIENT_ATTENTION, (7, 5))]
)
def test_where_no_kernel_runs_a_plain_product_takes_its_place(
    choice: SDPBackend,
    capability: tuple[int, int],
    launched: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(aten._fused_sdp_choice, "default", lambda *args, **kwargs: choice.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    targets, output, sums = run(True, torch.float16, every=2)
    attention_ = (
        EFFICIENT
        if choice is SDPBackend.EFFICIENT_ATTENTION
        else aten.scaled_dot_product_attention.default
    )
    assert attention_ in targets
    assert (aten.logsumexp.default in targets) == (choice is SDPBackend.MATH)
    assert aten.matmul.default in targets
    assert not launched
    assert (tuple(output.shape), tuple(sums.shape), sums.dtype) == (
        (2, 3, 50, 72),
        (2, 3, 50),
        torch.float32,
    )


def test_what_nobody_reads_is_not_computed(launched: list[tuple[Any, ...]]) -> None:
    targets, output, sums = run(False, torch.bfloat16)
    assert aten.scaled_dot_product_attention.default in targets
    assert not {*targets} & {CUDNN, FLASH, EFFICIENT, aten.matmul.default}
    assert not launched
    assert (tuple(output.shape), tuple(sums.shape)) == ((2, 3, 50, 72), (2, 3, 50))


@pytest.mark.parametrize("read", [None, True, False])
def test_elsewhere_the_operator_is_what_it_stands_for(read: bool | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, tokens, 16, generator=generator) for tokens in (50, 30, 30)
    )
    told = None if read is None else torch.tensor(read)
    output, sums = attention_and_columns(query, key, value, 0.3, 4, told)
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, scale=0.3))
    assert output.transpose(1, 2).is_contiguous()
    expected = torch.softmax(query @ key.mT * 0.3, dim=-1)[:, :, ::4].sum(2)
    assert (
        torch.equal(sums, torch.zeros_like(sums))
        if read is False
        else (sums - expected).abs().max() < 1e-5
    )
    torch.library.opcheck(
        OPERATOR, (query, key, value, 0.3, 4, told), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("read", [True, False])
def test_the_callers_autocast_changes_no_type(read: bool) -> None:
    query, key, value = (
        torch.randn(1, 2, 10, 16, generator=torch.Generator().manual_seed(seed))
        for seed in range(3)
    )
    with torch.autocast("cpu", torch.bfloat16):
        output, sums = attention_and_columns(query, key, value, 0.3, 1, torch.tensor(read))
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value, scale=0.3))
    assert sums.dtype == torch.float32
    assert torch.allclose(sums.sum(-1), torch.full((1, 2), 10.0 * read))


def test_columns_of_chunks_and_of_totals_that_are_known() -> None:
    query, key = (
        torch.randn(1, 2, 1100, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for _ in range(2)
    )
    logits = query @ key.mT * 0.3
    for total in (None, logits.logsumexp(-1)):
        assert (column_sums(query, key, 0.3, total) - logits.softmax(-1).sum(2)).abs().max() < 1e-12


# Its place in step graphs


@pytest.mark.parametrize(("every", "looked_at"), [(1, 50), (4, 13)])
@pytest.mark.usefixtures("device")
def test_its_work_is_the_attention_and_one_more_product(every: int, looked_at: int) -> None:
    def score(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return attention_and_columns(query, key, value, 0.3, every)

    inputs = [torch.empty(2, 3, tokens, 8, device="cuda") for tokens in (50, 40, 40)]
    traced = make_fx(score, tracing_mode="fake")(*inputs)
    product = 2 * 2 * 3 * 40 * 8
    assert sum(count_flops(traced, inputs).values()) == product * (2 * 50 + looked_at)
    assert sum(columns_flops(node) for node in traced.graph.nodes) == product * looked_at
