"""Outputs restricted to chosen rows: numbers, and the operators that work on all tokens."""

from __future__ import annotations

import operator
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.graph.rewrite.layers import (
    BATCH,
    CHANNELS,
    TEXT,
    TOKENS,
    WIDE,
    Function,
    Layers,
    Restricted,
    Shapes,
    a_condition_expanded,
    a_linear_over_tokens,
    a_mean_over_samples,
    a_norm_of_tokens_and_channels,
    a_slice_of_mixed_streams,
    a_slice_with_positions_of_all,
    a_softmax_over_tokens,
    a_stream_written_into_a_sequence,
    a_sum_over_tokens,
    blocked_behind_flattening,
    blocked_with_heads_beside_samples,
    both_streams,
    build,
    halves_of_channels,
    heads_beside_samples,
    heads_of_flattened_tokens,
    modulated,
    one_of_two_streams,
    queries_of_an_attention,
    samples_and_tokens_flattened,
    samples_and_tokens_flattened_late,
    samples_mixed,
    several_tensors_without_a_rule,
    some,
    streams_split,
    the_end_of_mixed_streams_but_one,
    the_other_stream,
    tokens_before_samples,
    tokens_before_samples_flattened,
    two_slices_of_mixed_streams,
    with_positions,
    with_positions_of_one_row,
)
from tests.helpers import capture
from toca_fx.capture.aten import to_aten
from toca_fx.graph.tokenwise import Tokens
from toca_fx.rewrite.restrict import Restriction

aten = torch.ops.aten

FRESH = 3  # K; it differs from the sizes of the layers, and B * K from B * N: a shape tells all

# What rows are taken from, and what some operators returned for K tokens.
HERE: list[Any] = ["input"]
K = (BATCH, FRESH)
MLP = [(*K, WIDE), (*K, CHANNELS)]
LONG = TEXT + TOKENS
CASES: dict[Function, tuple[list[Any], Shapes]] = {
    modulated: (
        HERE,
        {
            aten.layer_norm.default: [(*K, CHANNELS)],
            aten.linear.default: [(BATCH, 2 * CHANNELS), *MLP],
        },
    ),
    with_positions: (
        HERE * 2,
        {aten.layer_norm.default: [(*K, CHANNELS)], aten.linear.default: MLP},
    ),
    with_positions_of_one_row: (
        ["input", aten.slice.Tensor],
        {aten.layer_norm.default: [(*K, CHANNELS)], aten.linear.default: MLP},
    ),
    samples_and_tokens_flattened: (
        HERE,
        {
            aten.layer_norm.default: [(BATCH * FRESH, CHANNELS)],
            aten.linear.default: [(BATCH * FRESH, WIDE), (BATCH * FRESH, CHANNELS)],
        },
    ),
    samples_and_tokens_flattened_late: (
        HERE,
        {
            aten.layer_norm.default: [(*K, CHANNELS)],
            aten.linear.default: [(*K, WIDE), (BATCH * FRESH, CHANNELS)],
        },
    ),
    tokens_before_samples_flattened: (
        [aten.cumsum.default],
        {aten.linear.default: [(FRESH * BATCH, WIDE), (FRESH * BATCH, CHANNELS)]},
    ),
    blocked_behind_flattening: (
        [aten.cumsum.default],
        {aten.linear.default: [(FRESH * BATCH, WIDE), (FRESH * BATCH, CHANNELS)]},
    ),
    heads_beside_samples: (
        ["input", aten.sum.dim_IntList],
        {
            aten.linear.default: [(BATCH, TOKENS, CHANNELS), (*K, CHANNELS)],
            aten.bmm.default: [
                (BATCH * 2, FRESH, TOKENS),
                (BATCH * 2, FRESH, CHANNELS // 2),
            ],
        },
    ),
    blocked_with_heads_beside_samples: (
        [aten.cumsum.default],
        {aten.gelu.default: [(BATCH * 2, FRESH, CHANNELS // 2), MLP[0]]},
    ),
    heads_of_flattened_tokens: (
        [aten.cumsum.default],
        {aten.cumsum.default: [(2, BATCH * TOKENS, CHANNELS // 2)]},
    ),
    one_of_two_streams: (
        HERE,
        {aten.cat.default: [], aten.layer_norm.default: [(*K, CHANNELS)], aten.linear.default: MLP},
    ),
    the_other_stream: (
        [aten.unflatten.int],
        {aten.cat.default: [], aten.linear.default: [(BATCH, TEXT * CHANNELS), *MLP]},
    ),
    streams_split: (
        HERE,
        {aten.cat.default: [], aten.layer_norm.default: [(*K, CHANNELS)], aten.linear.default: MLP},
    ),
    a_slice_of_mixed_streams: (
        [aten.cumsum.default],
        {
            aten.cumsum.default: [(BATCH, LONG, CHANNELS)],
            aten.layer_norm.default: [(*K, CHANNELS)],
            aten.slice.Tensor: [],
        },
    ),
    the_end_of_mixed_streams_but_one: (
        [aten.cumsum.default],
        {aten.layer_norm.default: [(*K, CHANNELS)], aten.slice.Tensor: []},
    ),
    two_slices_of_mixed_streams: (
        [aten.cumsum.default] * 2,
        {aten.slice.Tensor: [], aten.linear.default: [(BATCH, TEXT * CHANNELS), *MLP]},
    ),
    a_slice_with_positions_of_all: (HERE * 2, {aten.cat.default: [], aten.linear.default: MLP}),
    both_streams: (
        [aten.cat.default],
        {aten.cat.default: [(BATCH, LONG, CHANNELS)], aten.layer_norm.default: [(*K, CHANNELS)]},
    ),
    a_stream_written_into_a_sequence: (
        HERE,
        {aten.cumsum.default: [], aten.slice_scatter.default: [], aten.linear.default: MLP},
    ),
    queries_of_an_attention: (
        HERE,
        {
            aten.layer_norm.default: [(BATCH, TOKENS, CHANNELS), (*K, CHANNELS)],
            aten.linear.default: [(BATCH, TOKENS, CHANNELS), (*K, CHANNELS), *MLP],
            aten.scaled_dot_product_attention.default: [(BATCH, 2, FRESH, CHANNELS // 2)],
        },
    ),
    a_sum_over_tokens: (
        [aten.cumsum.default],
        {
            aten.layer_norm.default: [(BATCH, TOKENS, CHANNELS)],
            aten.cumsum.default: [(BATCH, TOKENS, CHANNELS)],
            aten.linear.default: MLP,
        },
    ),
    a_linear_over_tokens: (
        [aten.linear.default],
        {aten.linear.default: [(BATCH, CHANNELS, TOKENS), *MLP]},
    ),
    a_softmax_over_tokens: (
        [aten.softmax.int],
        {aten.softmax.int: [(BATCH, TOKENS, CHANNELS)], aten.linear.default: MLP},
    ),
    a_norm_of_tokens_and_channels: (
        [aten.layer_norm.default],
        {aten.layer_norm.default: [(BATCH, TOKENS, CHANNELS)], aten.linear.default: MLP},
    ),
    samples_mixed: (
        [aten.flip.default],
        {aten.flip.default: [(BATCH, TOKENS, CHANNELS)], aten.linear.default: MLP},
    ),
    a_mean_over_samples: (
        ["input", aten.mean.dim],
        {aten.mean.dim: [(1, TOKENS, CHANNELS)], aten.sub.Tensor: [(*K, CHANNELS)]},
    ),
    tokens_before_samples: (
        [aten.cumsum.default],
        {
            aten.cumsum.default: [(TOKENS, BATCH, CHANNELS)],
            aten.linear.default: [(FRESH, BATCH, WIDE), (FRESH, BATCH, CHANNELS)],
        },
    ),
    several_tensors_without_a_rule: (
        [operator.getitem],
        {aten.gelu.default: [(*K, CHANNELS // 2)]},
    ),
    halves_of_channels: (
        HERE,
        {aten.linear.default: [(*K, WIDE)], aten.stack.default: [(*K, WIDE // 2, 2)]},
    ),
    a_condition_expanded: (
        ["input", aten.expand.default],
        {aten.add.Tensor: [(*K, CHANNELS)], aten.linear.default: MLP},
    ),
}


by_function = pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)


@cache
def restricted_once(function: Function) -> Restricted:
    return Restricted(*build(function))


@by_function
def test_rows_are_taken_as_far_up_as_operators_act_per_token(function: Function) -> None:
    gathered, expected = CASES[function]
    restricted = restricted_once(function)
    assert restricted.gathered == gathered
    _, shapes = restricted.run(some(BATCH, restricted.where.count, FRESH))
    assert {target: shapes[target] for target in expected} == expected


@by_function
def test_one_graph_gives_the_rows_of_the_whole_output_for_every_number_of_them(
    function: Function,
) -> None:
    restricted = restricted_once(function)
    for fresh in range(restricted.where.count + 1):
        assert restricted.error(some(BATCH, restricted.where.count, fresh)) <= 1e-12


@by_function
@pytest.mark.parametrize(
    ("batch", "tokens", "channels"),
    [(1, TOKENS, CHANNELS), (4, 4, 4), (2, 1, CHANNELS)],
    ids=["one sample", "as many samples as tokens and channels", "one token"],
)
def test_sizes_that_could_be_mistaken_for_others(
    function: Function, batch: int, tokens: int, channels: int
) -> None:
    restricted = Restricted(*build(function, batch, tokens, channels))
    count = restricted.where.count
    assert restricted.error(some(batch, count, (count + 1) // 2)) <= 1e-12


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (both_streams, Tokens(BATCH, TOKENS, offset=TEXT)),
        (both_streams, Tokens(BATCH, TEXT)),
        (lambda model, x, c: model.mlp(x).transpose(1, 2), Tokens(BATCH, TOKENS, axis=2)),
        (
            lambda model, x, c: model.mlp(x).permute(1, 2, 0).cumsum(1),
            Tokens(BATCH, TOKENS, batch_axis=2, axis=0),
        ),
        (lambda model, x, c: model.heads(x).cumsum(3), Tokens(BATCH, TOKENS, axis=2)),
    ],
    ids=["behind others", "in front of others", "last", "first, samples last", "of heads"],
)
def test_tokens_may_lie_elsewhere_in_the_output(function: Function, where: Tokens) -> None:
    restricted = Restricted(*build(function), where=where)
    for fresh in range(where.count + 1):
        assert restricted.error(some(BATCH, where.count, fresh)) <= 1e-12


def test_what_is_needed_whole_is_gathered_from_and_not_computed_again() -> None:
    restricted = Restricted(*build(modulated), needed=aten.layer_norm.default)
    assert restricted.gathered == [aten.layer_norm.default]
    tokens = some(BATCH, TOKENS, FRESH)
    assert restricted.run(tokens)[1][aten.layer_norm.default] == [(BATCH, TOKENS, CHANNELS)]
    assert restricted.error(tokens) <= 1e-12


def test_the_operators_made_for_fresh_tokens_are_told() -> None:
    restricted = restricted_once(modulated)
    made = Counter(node.target for node in restricted.restrict.created)
    per_token = (
        aten.layer_norm.default,
        aten.mul.Tensor,
        aten.add.Tensor,
        aten.linear.default,
        aten.gelu.default,
    )
    assert made == dict(zip(per_token, (1, 1, 1, 2, 1), strict=True))
    assert set(restricted.restrict.created) <= set(restricted.module.graph.nodes)


def both_branches(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    x = model.norm(x)
    left, right = model.up(x).topk(WIDE // 2, dim=2)[0].chunk(2, dim=2)
    return left * right + x.square().sum(2, keepdim=True)


def test_a_node_with_two_readers_is_restricted_once() -> None:
    restricted = Restricted(*build(both_branches))
    tokens = some(BATCH, TOKENS, FRESH)
    shapes = restricted.run(tokens)[1]
    assert shapes[aten.layer_norm.default] == [(BATCH, TOKENS, CHANNELS), (*K, CHANNELS)]
    assert restricted.gathered == [operator.getitem, "input"]
    assert restricted.error(tokens) <= 1e-12


def test_several_tensors_that_cannot_be_restricted_are_left_to_their_readers() -> None:
    restricted = restricted_once(several_tensors_without_a_rule)
    (several,) = restricted.module.graph.find_nodes(op="call_function", target=aten.topk.default)
    assert restricted.restrict(several, restricted.where) is None


def test_new_nodes_go_where_the_caller_says_and_old_ones_are_used_again() -> None:
    model, x, c = build(lambda model, x, c: model.mlp(model.mlp(model.norm(x)) + x))
    captured, inputs = capture(model, x, c)
    graph = to_aten(captured, inputs).graph
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        rows = graph.placeholder("rows")
    restrict = Restriction(graph, rows, set(), torch.device("cpu"))
    _, first, _, second = graph.find_nodes(op="call_function", target=aten.linear.default)
    where, whole = Tokens(BATCH, TOKENS), list(graph.nodes)
    restrict.before = first.next
    one = restrict(first, where)
    assert restrict.before.prev is one
    restrict.before = second.next
    other = restrict(second, where)
    assert restrict.before.prev is other
    graph.lint()
    assert restrict(first, where) is one
    assert [node.target for node in restrict.created].count(aten.linear.default) == 4
    assert [node for node in graph.nodes if node in whole] == whole
