"""Copies of a graph's nodes that work on the fresh tokens only.

``x[rows]`` is taken as far up as ``tokenwise`` proves that operators act per token, at best from
the residual stream itself, above norm and modulation. Restricted values keep their rank and their
batch axis, with K instead of N, so that every other operand still broadcasts. Axes are followed
operator by operator: a size alone proves nothing.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.graph import axes, tokenwise
from toca_fx.graph.axes import shape_of
from toca_fx.graph.ops import SIZED
from toca_fx.graph.tokenwise import Tokens

aten = torch.ops.aten


class Restriction:
    """Restricts nodes to the fresh tokens of one site.

    ``rows`` [B, K] index the flattened [B * N] tokens of the site's ``batch`` samples and ``count``
    tokens. Nodes in ``needed`` are computed whole in any case: they are gathered from, not computed
    again. New nodes go in front of ``before``, which may move downstream from call to call.
    """

    def __init__(
        self, graph: fx.Graph, rows: fx.Node, needed: set[fx.Node], device: torch.device
    ) -> None:
        self._graph, self._rows, self._needed, self._device = graph, rows, needed, device
        self.before = rows
        self._done: dict[tuple[fx.Node, Tokens], fx.Node | None] = {}
        self._rows_in: dict[Tokens, fx.Node] = {}
        self.created: list[fx.Node] = []
        self.gathered: list[fx.Node] = []
        self._blocked: list[fx.Node] = []

    def take_blocked(self) -> list[fx.Node]:
        """The nodes gathered from since the last call that are needed whole for that only.

        Their operators mix tokens, or have no rule.
        """
        found, self._blocked = self._blocked, []
        return found

    def __call__(self, node: fx.Node, where: Tokens) -> fx.Node | None:
        """``node`` restricted to the tokens at ``where``.

        None if it is a list of tensors that cannot be restricted, so that its user has to be.
        """
        key = (node, where)
        if key not in self._done:
            restricted = None if node in self._needed else self._recompute(node, where)
            if restricted is None and isinstance(node.meta.get("val"), Tensor):
                restricted = self._gather(node, where)
                if node not in self._needed and node.op == "call_function":
                    self._blocked.append(node)
            self._done[key] = restricted
        return self._done[key]

    def _recompute(self, node: fx.Node, where: Tokens) -> fx.Node | None:
        moved = tokenwise.segment(node, where)
        if moved is not None:
            source, there = moved
            return self(source, there) if _has_samples(source, there) else None
        operands = tokenwise.operands(node, where)
        if operands is None:
            return None
        replaced: dict[fx.Node, fx.Node] = {}
        for operand, there in operands.items():
            if there.batch_axis is None:
                rank = len(shape_of(node))
                restricted: fx.Node | None = self._gather_shared(operand, there, where, rank)
            else:
                restricted = self(operand, there)
            if restricted is None:
                return None
            replaced[operand] = restricted
        with self._graph.inserting_before(self.before):
            copied = self._graph.node_copy(node, lambda operand: replaced.get(operand, operand))
            if node.target in SIZED:
                count = self._graph.call_function(aten.sym_size.int, (self._rows, 1))
                copied.prepend(count)
                if where.flat:
                    count = self._graph.call_function(operator.mul, (count, where.batch))
                    copied.prepend(count)
                sizes = axes.resized(node, where.axis, count)
                copied.args = (copied.args[0], sizes, *copied.args[2:])
        copied.meta.pop("stack", None)  # the copy goes with the site, not with the original
        self.created.append(copied)
        return copied

    def _gather(self, node: fx.Node, where: Tokens) -> fx.Node:
        """Take the fresh tokens of every sample out of a whole tensor."""
        if where.batch_axis is None:
            raise AssertionError(f"{node} is shared by the samples")
        shape = shape_of(node)
        self.gathered.append(node)
        with self._graph.inserting_before(self.before):
            if where.flat:
                rows = self._by_token(where) if where.tokens_first else self._rows
                flat_rows = self._graph.call_function(aten.flatten.using_ints, (rows,))
                index = [*[None] * where.axis, flat_rows]
                return self._graph.call_function(aten.index.Tensor, (node, index))
            front = _to_front(len(shape), where.batch_axis, where.axis)
            whole = self._permute(node, front)
            rest = [shape[i] for i in front[2:]]
            if where.groups > 1:
                sizes = [where.batch, where.groups, shape[where.axis], *rest]
                apart = self._graph.call_function(aten.reshape.default, (whole, sizes))
                whole = self._graph.call_function(aten.transpose.int, (apart, 1, 2))
                rest = [where.groups, *rest]
            sizes = [where.batch * shape[where.axis], *rest]
            flat = self._graph.call_function(aten.reshape.default, (whole, sizes))
            rows = self._in_longer(where, shape[where.axis])
            taken = self._graph.call_function(aten.index.Tensor, (flat, [rows]))
            if where.groups > 1:
                taken = self._graph.call_function(aten.transpose.int, (taken, 1, 2))
                taken = self._graph.call_function(aten.flatten.using_ints, (taken, 0, 1))
            return self._permute(taken, _inverse(front))

    def _gather_shared(self, node: fx.Node, there: Tokens, where: Tokens, rank: int) -> fx.Node:
        """Take the fresh tokens out of a tensor that all samples share (a table of positions).

        Its user broadcasts it to ``rank`` axes; the result has them all, with the samples along the
        user's batch axis.
        """
        shape = shape_of(node)
        padded = [1] * (rank - len(shape)) + list(shape)
        if where.batch_axis is None:
            raise AssertionError(f"{node} is read by something that all samples share")
        front = _to_front(rank, where.batch_axis, where.axis)
        self.gathered.append(node)
        with self._graph.inserting_before(self.before):
            reshaped = self._graph.call_function(aten.reshape.default, (node, padded))
            whole = self._permute(reshaped, front)
            table = self._graph.call_function(aten.select.int, (whole, 0, 0))
            tokens = self._graph.call_function(aten.remainder.Scalar, (self._rows, there.count))
            if there.offset:
                tokens = self._graph.call_function(aten.add.Tensor, (tokens, there.offset))
            taken = self._graph.call_function(aten.index.Tensor, (table, [tokens]))
            if where.groups > 1:
                repeat: Any = aten.repeat_interleave.self_int
                taken = self._graph.call_function(repeat, (taken, where.groups, 0))
            return self._permute(taken, _inverse(front))

    def _by_token(self, where: Tokens) -> fx.Node:
        """``rows`` as indices [K, B] into tokens of which the samples lie side by side."""
        samples: Any = (self._rows, where.count)
        sample = self._graph.call_function(
            aten.div.Tensor_mode, samples, {"rounding_mode": "floor"}
        )
        token = self._graph.call_function(aten.remainder.Scalar, (self._rows, where.count))
        first = self._graph.call_function(aten.mul.Tensor, (token, where.batch))
        index = self._graph.call_function(aten.add.Tensor, (first, sample))
        return self._graph.call_function(aten.transpose.int, (index, 0, 1))

    def _in_longer(self, where: Tokens, length: int) -> fx.Node:
        """``rows`` as indices into [B * length], where each sample's tokens begin at the offset."""
        if length == where.count:
            return self._rows
        key = Tokens(where.batch, length, offset=where.offset)
        if key not in self._rows_in:
            shift: Any = where.offset
            if where.batch > 1:
                on_device: dict[str, Any] = {"device": self._device}
                first = self._graph.call_function(aten.arange.default, (where.batch,), on_device)
                column = self._graph.call_function(aten.unsqueeze.default, (first, 1))
                shift = self._graph.call_function(aten.mul.Tensor, (column, length - where.count))
                if where.offset:
                    shift = self._graph.call_function(aten.add.Tensor, (shift, where.offset))
            self._rows_in[key] = self._graph.call_function(aten.add.Tensor, (self._rows, shift))
        return self._rows_in[key]

    def _permute(self, node: fx.Node, order: list[int]) -> fx.Node:
        if order == sorted(order):
            return node
        return self._graph.call_function(aten.permute.default, (node, order))


def _has_samples(node: fx.Node, where: Tokens) -> bool:
    return where.batch_axis is not None and shape_of(node)[where.batch_axis] == where.samples


def _to_front(rank: int, *axes: int) -> list[int]:
    """The order of axes that puts ``axes`` first."""
    return [*axes, *(axis for axis in range(rank) if axis not in axes)]


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
