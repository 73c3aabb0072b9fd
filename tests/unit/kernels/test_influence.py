"""Attention with s1 against the explicit map: each of the three ways, in chunks and in blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toca_fx.kernels import influence as attention
from toca_fx.kernels.influence import (
    attention_and_influence,
    feature_norm,
    influence,
    normalize,
    smallness,
)

HEADS, WIDTH = 3, 8


def unit(score: Tensor) -> Tensor:
    return score / score.square().sum(1, keepdim=True).sqrt()


def operands(
    tokens: int, dtype: torch.dtype = torch.float64, batch: int = 2, keys: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (tokens, keys or tokens, keys or tokens)
    query, key, value = (
        torch.randn(batch, HEADS, size, WIDTH, generator=generator, dtype=torch.float64)
        for size in sizes
    )
    return (2 * query).to(dtype), (2 * key).to(dtype), value.to(dtype)


def column_sums(
    query: Tensor,
    key: Tensor,
    scale: float = WIDTH**-0.5,
    mask: Tensor | None = None,
    every: int = 1,
) -> Tensor:
    """s1 from the explicit map, in double precision; ``mask`` is added to the logits."""
    logits = query.double() @ key.double().transpose(2, 3) * scale
    return (
        torch.softmax(logits if mask is None else logits + mask, dim=3)[:, :, ::every]
        .mean(dim=1)
        .sum(dim=1)
    )


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the ways was taken."""
    taken: list[str] = []
    in_blocks, by_product = attention._in_blocks, attention.influence

    def noting_blocks(*args: Any) -> Any:
        taken.append("in blocks")
        return in_blocks(*args)

    def noting_product(*args: Any, **kwargs: Any) -> Any:
        taken.append("recomputed" if args[3] is None else "fused")
        return by_product(*args, **kwargs)

    monkeypatch.setattr(attention, "_in_blocks", noting_blocks)
    monkeypatch.setattr(attention, "influence", noting_product)
    return taken


@pytest.mark.parametrize(
    "tokens", [5, 512, 1100]
)  # 1100: three chunks of queries, the last one short
@pytest.mark.parametrize("scale", [WIDTH**-0.5, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_influence_is_the_column_sum_of_the_attention_map(
    tokens: int, scale: float, fused: bool
) -> None:
    query, key, _ = operands(tokens)
    logits = query @ key.transpose(2, 3) * scale
    found = influence(query, key, scale, logits.logsumexp(3) if fused else None)
    assert found.shape == (2, tokens)
    assert (found - column_sums(query, key, scale)).abs().max() < 1e-13


@pytest.mark.parametrize("tokens", [1, 64, 1100])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_in_blocks(tokens: int, scale: float | None, kernels: list[str]) -> None:
    query, key, value = operands(tokens)
    output, score = attention_and_influence(query, key, value, scale=scale)
    assert kernels == ["in blocks"]
    assert (
        output - F.scaled_dot_product_attention(query, key, value, scale=scale)
    ).abs().max() < 1e-13
    assert (score - column_sums(query, key, scale or WIDTH**-0.5)).abs().max() < 1e-13


@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize(("samples", "rows"), [(5, 1), (5, 7), (2, 100), (3, 64), (1, 100)])
def test_the_size_of_a_block_changes_nothing(samples: int, rows: int, every: int) -> None:
    query, key, value = operands(100, batch=5)
    whole, expected = attention._in_blocks(query, key, value, 0.3, every, 5, 100)
    output, score = attention._in_blocks(query, key, value, 0.3, every, samples, rows)
    assert (output - whole).abs().max() < 1e-13
    assert (score - expected).abs().max() < 1e-13


def test_blocks_are_whole_maps_as_long_as_one_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = operands(100, batch=3)
    found, sparse = [], []
    for queries in (300, 200, 100, 99, 25, 24):  # that fit
        monkeypatch.setattr(attention, "_BLOCK_ELEMENTS", HEADS * 100 * queries)
        found.append(attention._blocks(query, key, every=2))
        sparse.append(attention._blocks(query, key, every=3))
    assert found == [(3, 100), (1, 100), (1, 100), (1, 50), (1, 25), None], "16 blocks at most"
    assert sparse == [(3, 100), *[None] * 5], "one, if few queries count"


def test_a_key_for_all_samples(kernels: list[str]) -> None:
    query, (_, key, value) = operands(20)[0], operands(20, batch=1)
    output, score = attention_and_influence(query, key, value)
    assert kernels == ["recomputed"]
    assert (output - F.scaled_dot_product_attention(query, key, value)).abs().max() < 1e-13
    assert (score - column_sums(query, key)).abs().max() < 1e-13


def test_large_maps_take_the_fused_kernel(
    kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        attention, "_BLOCK_ELEMENTS", 2 * HEADS * 600 * 10
    )  # ten rows of the map: 60 blocks
    query, key, value = operands(600, torch.float32)
    output, score = attention_and_influence(query, key, value)
    assert kernels == ["fused"]
    assert (output - F.scaled_dot_product_attention(query, key, value)).abs().max() < 1e-6
    assert (unit(score) - unit(column_sums(query, key))).abs().max() < 1e-6


def test_half_precision_takes_the_fused_kernel(kernels: list[str]) -> None:
    query, key, value = operands(64, torch.bfloat16)
    output, score = attention_and_influence(query, key, value)
    assert kernels == ["fused"]
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value))
    assert score.dtype == torch.float32
    assert (unit(score) - unit(column_sums(query, key))).abs().max() < 5e-3


@pytest.mark.parametrize("tokens", [6, 600])
@pytest.mark.parametrize("shape", ["all rows", "one row for all queries", "added"])
def test_masks(tokens: int, shape: str, kernels: list[str]) -> None:
    query, key, value = operands(tokens)
    keep = (
        torch.rand(
            2,
            1,
            1 if shape == "one row for all queries" else tokens,
            tokens,
            generator=torch.Generator().manual_seed(1),
        )
        < 0.5
    )
    keep[..., 0] = True
    added = torch.zeros_like(keep, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    output, score = attention_and_influence(query, key, value, added if shape == "added" else keep)
    assert kernels == ["recomputed"]
    assert (output - F.scaled_dot_product_attention(query, key, value, keep)).abs().max() < 1e-13
    assert (score - column_sums(query, key, mask=added)).abs().max() < 1e-13


@pytest.mark.parametrize("tokens", [6, 600])
def test_causal(tokens: int, kernels: list[str]) -> None:
    query, key, value = operands(tokens)
    output, score = attention_and_influence(query, key, value, None, 0.0, True)
    mask = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)
    assert kernels == ["recomputed"]
    assert (
        output - F.scaled_dot_product_attention(query, key, value, is_causal=True)
    ).abs().max() < 1e-13
    assert (score - column_sums(query, key, mask=mask)).abs().max() < 1e-13


def test_grouped_heads(kernels: list[str]) -> None:
    query, key, value = operands(16)
    output, score = attention_and_influence(query, key[:, :1], value[:, :1], enable_gqa=True)
    expected = F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], enable_gqa=True)
    assert kernels == ["recomputed"]
    assert (output - expected).abs().max() < 1e-13
    assert (score - column_sums(query, key[:, :1])).abs().max() < 1e-13


WAYS = ["in blocks", "fused", "masked", "causal", "grouped", "beside", "the map"]


# Chunks of 512 queries, of which 3 and 50 are no part.
@pytest.mark.parametrize("every", [3, 4, 50, 5000])
@pytest.mark.parametrize("way", WAYS)
def test_every_nth_query_is_looked_at(
    way: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "fused":
        monkeypatch.setattr(attention, "_blocks", lambda query, key, every: None)
    query, key, value = operands(1100)
    added = torch.zeros(1100, 1100, dtype=torch.float64)
    options: dict[str, Any] = {}
    if way == "masked":
        added.view(-1)[::7] = -torch.inf
        options = {"attn_mask": added}
    elif way == "causal":
        added.fill_(-torch.inf).triu_(1)
        options = {"is_causal": True}
    elif way == "grouped":
        key, value, options = key[:, :1], value[:, :1], {"enable_gqa": True}
    if way == "beside":
        score = influence(query, key, WIDTH**-0.5, every=every)
    elif way == "the map":
        score = attention.map_influence(
            torch.softmax(query @ key.transpose(2, 3) * WIDTH**-0.5, dim=3), every
        )
    else:
        output, score = attention_and_influence(query, key, value, **options, every=every)
        assert (
            output - F.scaled_dot_product_attention(query, key, value, **options)
        ).abs().max() < 1e-12
    assert (score - column_sums(query, key, mask=added, every=every)).abs().max() < 1e-12


def test_a_mask_of_one_row_holds_for_the_queries_that_are_looked_at() -> None:
    query, key, value = operands(10)
    keep = torch.arange(10) % 3 > 0
    _, score = attention_and_influence(query, key, value, keep[None], every=4)
    added = torch.zeros(10, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    assert (score - column_sums(query, key, mask=added, every=4)).abs().max() < 1e-13


def test_more_keys_than_queries() -> None:
    query, key, value = operands(10, keys=25)
    output, score = attention_and_influence(query, key, value)
    assert (output - F.scaled_dot_product_attention(query, key, value)).abs().max() < 1e-13
    assert score.shape == (2, 25)
    assert (score - column_sums(query, key)).abs().max() < 1e-13


def test_huge_logits_do_not_overflow() -> None:
    query, key, value = operands(32, torch.float32)
    output, score = attention_and_influence(100 * query, key, value)
    assert (output - F.scaled_dot_product_attention(100 * query, key, value)).abs().max() < 1e-3
    assert (score - column_sums(100 * query, key)).abs().max() < 1e-4


def test_the_output_lies_in_memory_as_that_of_the_kernels() -> None:
    query, key, value = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in operands(16))
    output, _ = attention_and_influence(query, key, value)
    assert output.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("given", "score"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_scores_are_at_least_single_precision(given: torch.dtype, score: torch.dtype) -> None:
    query, key, value = operands(7, given)
    assert attention_and_influence(query, key, value)[1].dtype == score
    assert feature_norm(key).dtype == score


def test_feature_norm_by_hand() -> None:
    feature = torch.tensor(
        [[[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 7.0]]]]
    )  # [1, 2 heads, 2 tokens, 2]
    assert torch.allclose(feature_norm(feature), torch.tensor([[2.5, 4.0]]))


def test_smallness_by_hand() -> None:
    """Short values first, whatever their sign; the longer ones are below 0."""
    value = torch.tensor(
        [[[[3.0, 4.0], [0.0, 0.5], [0.6, 0.8]], [[0.0, 0.0], [0.0, 0.5], [2.0, 0.0]]]]
    )  # [1, 2 heads, 3 tokens, 2]
    found = smallness(value)
    assert torch.allclose(found, torch.tensor([[-3.0, 1.0, -1.0]]))
    assert torch.allclose(normalize(found), found / 11**0.5)
    assert smallness(value.bfloat16()).dtype == torch.float32


def test_normalize_leaves_zeros_at_zero() -> None:
    assert torch.equal(normalize(torch.zeros(2, 4)), torch.zeros(2, 4))
    assert torch.allclose(normalize(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))


# Entropies


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_entropy_of_each_query_by_the_formula(share: float, masked: bool) -> None:
    query, key, value = operands(6, keys=9)
    keep = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    keep[0, ..., 5:] = not masked
    mask = keep if masked else None
    logits = (query @ key.transpose(2, 3) * WIDTH**-0.5).masked_fill(~keep, -torch.inf)
    weights = torch.softmax(logits, dim=3)
    mean = share * weights.mean(dim=1)
    expected = -(mean * torch.log(mean + 1e-7)).sum(dim=2)
    output, found = attention.attention_and_entropy(query, key, value, mask, share=share)
    assert (output - F.scaled_dot_product_attention(query, key, value, mask)).abs().max() < 1e-13
    for score in (
        found,
        attention.entropy(query, key, WIDTH**-0.5, mask, share),
        attention.map_entropy(weights, share),
    ):
        assert (score - expected).abs().max() < 1e-13


def test_entropy_of_grouped_heads_and_of_maps_too_large_to_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, value = operands(6, keys=9)
    few = (query, key[:, :1], value[:, :1])
    output, expected = attention.attention_and_entropy(*few, enable_gqa=True)
    assert (output - F.scaled_dot_product_attention(*few, enable_gqa=True)).abs().max() < 1e-13
    monkeypatch.setattr(attention, "_MAP_ELEMENTS", 1)
    again, found = attention.attention_and_entropy(*few, enable_gqa=True)
    assert (again - output).abs().max() < 1e-13
    assert (found - expected).abs().max() < 1e-13


def test_halves_of_a_guidance_batch_sum_to_the_maps_side_by_side() -> None:
    query, key, _ = operands(6, keys=9)
    weights = torch.softmax(query @ key.transpose(2, 3), dim=3)
    both = 0.5 * torch.cat([weights[0].mean(0), weights[1].mean(0)], dim=-1)
    assert (
        attention.map_entropy(weights, 0.5).sum(0) + (both * (both + 1e-7).log()).sum(-1)
    ).abs().max() < 1e-13


def test_a_segment_is_normalised_among_its_own_tokens() -> None:
    assert torch.allclose(
        attention.of_segment(torch.tensor([[9.0, 3.0, 4.0, 9.0]]), 1, 2), torch.tensor([[0.6, 0.8]])
    )
