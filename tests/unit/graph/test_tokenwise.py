"""Where tokens lie, by brute force: whatever else changes in the operands, a token of the output
stays what it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from toca_fx.graph import tokenwise
from toca_fx.graph.tokenwise import Tokens

aten = torch.ops.aten

Build = Callable[..., fx.Node]
HERE = Tokens(2, 6)
HEADS = Tokens(2, 6, axis=2)
FLAT = Tokens(2, 6, batch_axis=0, axis=0)
TOKENS_FIRST = replace(FLAT, tokens_first=True)
GROUPED = Tokens(2, 6, groups=3)
Case = tuple[tuple[tuple[int, ...], ...], Build, Tokens, tuple[Tokens, ...] | None]

OPERANDS: dict[str, Case] = {
    "the same place": (((2, 6, 4),), lambda call, x: call(aten.gelu.default, x), HERE, (HERE,)),
    "both operands": (
        ((2, 6, 4), (2, 6, 4)),
        lambda call, x, y: call(aten.mul.Tensor, x, y),
        HERE,
        (HERE, HERE),
    ),
    "a table for all samples": (
        ((2, 6, 4), (6, 4)),
        lambda call, x, y: call(aten.add.Tensor, x, y),
        HERE,
        (HERE, replace(HERE, batch_axis=None, axis=0)),
    ),
    "a table with a batch of one": (
        ((2, 6, 4), (1, 6, 4)),
        lambda call, x, y: call(aten.add.Tensor, x, y),
        HERE,
        (HERE, replace(HERE, batch_axis=None)),
    ),
    "heads": (((2, 6, 3, 4),), lambda call, x: call(aten.transpose.int, x, 1, 2), HEADS, (HERE,)),
    "heads split off": (
        ((2, 6, 12),),
        lambda call, x: call(aten.view.default, x, [2, 6, 3, 4]),
        HERE,
        (HERE,),
    ),
    "samples and tokens flattened": (
        ((2, 6, 4),),
        lambda call, x: call(aten.view.default, x, [12, 4]),
        FLAT,
        (HERE,),
    ),
    "samples and tokens apart again": (
        ((12, 4),),
        lambda call, x: call(aten.view.default, x, [2, 6, 4]),
        HERE,
        (FLAT,),
    ),
    "tokens and samples flattened": (
        ((6, 2, 4),),
        lambda call, x: call(aten.view.default, x, [12, 4]),
        TOKENS_FIRST,
        (Tokens(2, 6, batch_axis=1, axis=0),),
    ),
    "tokens and samples apart again": (
        ((12, 4),),
        lambda call, x: call(aten.view.default, x, [6, 2, 4]),
        Tokens(2, 6, batch_axis=1, axis=0),
        (TOKENS_FIRST,),
    ),
    "tokens and samples, flattened as they are": (
        ((12, 4),),
        lambda call, x: call(aten.view.default, x, [12, 2, 2]),
        TOKENS_FIRST,
        (TOKENS_FIRST,),
    ),
    "flattened the other way round": (
        ((12, 4),),
        lambda call, x: call(aten.view.default, x, [2, 6, 4]),
        Tokens(2, 6, batch_axis=1, axis=0),
        None,
    ),
    "heads beside samples": (
        ((2, 3, 6, 4),),
        lambda call, x: call(aten.view.default, x, [6, 6, 4]),
        GROUPED,
        (HEADS,),
    ),
    "heads beside samples, apart again": (
        ((6, 6, 4),),
        lambda call, x: call(aten.view.default, x, [2, 3, 6, 4]),
        HEADS,
        (GROUPED,),
    ),
    "heads beside samples, behind tokens": (
        ((6, 2, 12),),
        lambda call, x: call(aten.view.default, x, [6, 6, 4]),
        Tokens(2, 6, batch_axis=1, axis=0, groups=3),
        (Tokens(2, 6, batch_axis=1, axis=0),),
    ),
    "samples beside heads": (
        ((6, 6, 4),),
        lambda call, x: call(aten.view.default, x, [3, 2, 6, 4]),
        Tokens(2, 6, batch_axis=1, axis=2),
        None,
    ),
    "a product for each head": (
        ((6, 6, 4), (6, 4, 5)),
        lambda call, x, y: call(aten.bmm.default, x, y),
        GROUPED,
        (GROUPED,),
    ),
    "one table for heads and samples": (
        ((6, 6, 4), (6, 4)),
        lambda call, x, y: call(aten.add.Tensor, x, y),
        GROUPED,
        (GROUPED, replace(HERE, batch_axis=None, axis=0)),
    ),
    "a linear on flattened tokens": (
        ((12, 4), (4, 5)),
        lambda call, x, w: call(aten.mm.default, x, w),
        FLAT,
        (FLAT,),
    ),
    "tokens among others": (
        ((2, 9, 4),),
        lambda call, x: call(aten.neg.default, x),
        replace(HERE, offset=2),
        (replace(HERE, offset=2),),
    ),
    "flattened tokens split into heads of samples": (
        ((12, 4),),
        lambda call, x: call(aten.unflatten.int, x, 0, [2, 6]),
        HERE,
        None,
    ),
    "tokens mixed": (((2, 6, 4),), lambda call, x: call(aten.cumsum.default, x, 1), HERE, None),
    "tokens as channels": (
        ((2, 4, 6), (6, 6)),
        lambda call, x, w: call(aten.linear.default, x, w),
        replace(HERE, axis=2),
        None,
    ),
    "tokens cut in two": (
        ((2, 6, 4),),
        lambda call, x: call(aten.view.default, x, [2, 3, 8]),
        Tokens(2, 3),
        None,
    ),
    "samples mixed": (((2, 6, 4),), lambda call, x: call(aten.softmax.int, x, 0), HERE, None),
}

SEGMENTS: dict[
    str, tuple[tuple[tuple[int, ...], ...], Build, Tokens, tuple[int, Tokens] | None]
] = {
    "a slice": (
        ((2, 9, 4),),
        lambda call, x: call(aten.slice.Tensor, x, 1, 3, 9),
        HERE,
        (0, replace(HERE, offset=3)),
    ),
    "a slice from the end": (
        ((2, 9, 4),),
        lambda call, x: call(aten.slice.Tensor, x, 1, -6),
        HERE,
        (0, replace(HERE, offset=3)),
    ),
    "a slice with steps": (
        ((2, 12, 4),),
        lambda call, x: call(aten.slice.Tensor, x, 1, 0, 12, 2),
        HERE,
        None,
    ),
    "a slice of channels": (
        ((2, 6, 9),),
        lambda call, x: call(aten.slice.Tensor, x, 2, 3, 9),
        HERE,
        None,
    ),
    "a narrow": (
        ((2, 9, 4),),
        lambda call, x: call(aten.narrow.default, x, 1, 2, 6),
        HERE,
        (0, replace(HERE, offset=2)),
    ),
    "the second of a concatenation": (
        ((2, 3, 4), (2, 6, 4)),
        lambda call, x, y: call(aten.cat.default, [x, y], 1),
        replace(HERE, offset=3),
        (1, HERE),
    ),
    "tokens of both of a concatenation": (
        ((2, 3, 4), (2, 6, 4)),
        lambda call, x, y: call(aten.cat.default, [x, y], 1),
        replace(HERE, offset=2),
        None,
    ),
    "a slice written": (
        ((2, 9, 4), (2, 6, 4)),
        lambda call, x, y: call(aten.slice_scatter.default, x, y, 1, 3, 9),
        replace(HERE, offset=3),
        (1, HERE),
    ),
    "what a slice written leaves": (
        ((2, 9, 4), (2, 3, 4)),
        lambda call, x, y: call(aten.slice_scatter.default, x, y, 1, 0, 3),
        replace(HERE, offset=3),
        (0, replace(HERE, offset=3)),
    ),
    "tokens half written": (
        ((2, 9, 4), (2, 5, 4)),
        lambda call, x, y: call(aten.slice_scatter.default, x, y, 1, 0, 5),
        HERE,
        None,
    ),
}


def built(shapes: tuple[tuple[int, ...], ...], build: Build) -> tuple[list[fx.Node], fx.Node]:
    graph, generator = fx.Graph(), torch.Generator().manual_seed(0)
    inputs = []
    for number, shape in enumerate(shapes):
        node = graph.placeholder(f"input_{number}")
        node.meta["val"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        inputs.append(node)

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta["val"] = target(*fx.map_arg(args, lambda operand: operand.meta["val"]))
        return made

    return inputs, build(call, *inputs)


def token(value: Tensor, where: Tokens, sample: int, position: int) -> Tensor:
    """A view of one token of one sample."""
    if where.tokens_first:
        return value.select(where.axis, position * where.batch + sample)
    if where.flat:
        return value.select(where.axis, sample * where.count + position)
    if where.groups > 1:
        value = value.unflatten(where.batch_axis or 0, (-1, where.groups))
        behind = where.axis > (where.batch_axis or 0)
        return token(value, replace(where, groups=1, axis=where.axis + behind), sample, position)
    taken = value.select(where.axis, where.offset + position)
    return (
        taken
        if where.batch_axis is None
        else taken.select(where.batch_axis - (where.batch_axis > where.axis), sample)
    )


def with_all_else_changed(value: Tensor, where: Tokens, sample: int, position: int) -> Tensor:
    changed = value + 1
    token(changed, where, sample, position).copy_(token(value, where, sample, position))
    return changed


@pytest.mark.parametrize("name", OPERANDS)
def test_a_token_needs_the_same_token_of_its_operands(name: str) -> None:
    shapes, build, where, expected = OPERANDS[name]
    inputs, node = built(shapes, build)
    found = tokenwise.operands(node, where)
    assert found == (None if expected is None else dict(zip(inputs, expected, strict=False)))
    if found is None:
        return
    for sample, position in ((0, 0), (1, 4)):
        values = [
            with_all_else_changed(operand.meta["val"], found[operand], sample, position)
            if operand in found
            else operand.meta["val"]
            for operand in inputs
        ]
        changed = node.target(*values, *node.args[len(inputs) :])  # type: ignore[operator]
        assert torch.equal(
            token(changed, where, sample, position),
            token(node.meta["val"], where, sample, position),
        )
        assert not torch.equal(changed, node.meta["val"])


@pytest.mark.parametrize("name", SEGMENTS)
def test_a_segment_comes_from_one_operand_as_it_is(name: str) -> None:
    shapes, build, where, expected = SEGMENTS[name]
    inputs, node = built(shapes, build)
    found = tokenwise.segment(node, where)
    assert found == (None if expected is None else (inputs[expected[0]], expected[1]))
    if found is None:
        return
    source, there = found
    for sample, position in ((0, 0), (1, 4)):
        assert torch.equal(
            token(node.meta["val"], where, sample, position),
            token(source.meta["val"], there, sample, position),
        )


def test_one_part_of_a_split() -> None:
    (x,), part = built(
        ((2, 9, 4),),
        lambda call, x: call(
            operator.getitem, call(aten.split_with_sizes.default, x, [3, 6], 1), 1
        ),
    )
    assert tokenwise.segment(part, HERE) == (x, replace(HERE, offset=3))


def test_flattened_tokens_have_no_segments() -> None:
    _, node = built(((18, 4),), lambda call, x: call(aten.slice.Tensor, x, 0, 6, 18))
    assert tokenwise.segment(node, FLAT) is None
