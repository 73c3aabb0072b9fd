"""The kernels that inductor makes of a graph, and what they write to memory; it is not called.

    kernels     products, convolutions, attention, sorting, complex numbers, operators that are not
                ATen's: operands and results are written
    reductions  sums and means: results are written, operands are not
    fused       everything else, norms and gathers among it: computed again by each reader and never
                written, unless a kernel takes it, it is handed on, or it reads too much
    views       share the memory of what they are a view of

The rules are those of torch/_inductor (GraphLowering.run_node and StorageBox there), applied to the
operators that its decompositions start from. Left out: kernels that are fused because they read the
same, and concatenations that are written part by part.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.graph.names import namespace, operator_name
from toca_fx.graph.ops import (
    ATTENTIONS,
    CONVOLUTIONS,
    LINEARS,
    MMS,
    NORMS,
    PRODUCTS,
    REDUCTIONS,
    RESHAPES,
    SAME,
    SOFTMAXES,
)
from toca_fx.torch_private import storage_id


def _names(targets: Iterable[object]) -> frozenset[str]:
    """The overload packets of ``targets``: inductor treats their overloads alike."""
    return frozenset(filter(None, map(operator_name, targets)))


# Overload packets by name: those in the table of operators, and others that inductor has a rule
# for. The table needs no more than those of which something is proven.
_KERNELS = (
    _names(LINEARS | MMS | PRODUCTS | ATTENTIONS | CONVOLUTIONS)
    | {"convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
    | {"sort", "argsort", "topk", "scatter", "index_put", "index_copy"}
)
_REDUCTIONS = (
    _names(REDUCTIONS) | {"amin", "argmax", "argmin"} | {"logsumexp", "var", "std", "linalg_norm"}
)
_NORMS = _names(NORMS | SOFTMAXES) | {"native_layer_norm", "group_norm", "log_softmax"}
_TWICE = _NORMS | {"gelu", "silu"}  # they read their operand more than once
# The results of the first are in another order than their operands, if they copy; those of the
# second are in the same, if they are views.
_MOVING = frozenset(
    {"cat", "stack", "index", "index_select", "clone", "contiguous", "reshape", "flatten"}
)
_STRAIGHT = _names(RESHAPES | SAME)
# Operations in an inner loop; operators that are not listed count for _OPS_OF_ONE.
_OPS = {"gelu": 12, "layer_norm": 10, "rms_norm": 8, "softmax": 5, "silu": 4}
_OPS_OF_ONE = 2

# config.realize_reads_threshold, realize_acc_reads_threshold, realize_opcount_threshold of
# inductor.
_READS_IF_REUSED, _MOST_READS, _MOST_OPS = 4, 8, 30


@dataclass(eq=False)
class Allocation:
    """Memory that a graph writes: ``nbytes`` if all tokens are fresh.

    ``site`` is the site whose fresh tokens scale it, if any. ``piece`` is the number of the piece
    that writes it, and ``end`` says that the graph returns it. Inputs have ``piece`` -1 and take
    nothing.
    """

    name: str
    nbytes: int
    dtype: torch.dtype | None
    piece: int
    site: int | None = None
    end: bool = False


@dataclass(eq=False)
class Kernel:
    """A kernel, and the memory that it reads and writes.

    The values of ``reads`` say whether it reads in the order in which it writes. ``fused`` kernels
    may write where they have read.
    """

    name: str
    piece: int
    reads: dict[Allocation, bool]
    writes: list[Allocation]
    fused: bool


_Read = tuple[Allocation, Any]  # a buffer, and through which view it is read


@dataclass(eq=False)
class _Value:
    """What a node computes, shared by all views of it.

    It lies in ``buffer`` once it is ``written``; until then it is computed from ``reads`` in
    ``ops`` operations, by a ``fused`` kernel or a reduction. ``counted`` are the reads that the
    compiler counts when it decides what to write: those of values that it would write, but for the
    kernel that reads them, stand for themselves.
    """

    buffer: Allocation
    reads: dict[_Read, bool] = field(default_factory=dict)
    ops: int = 0
    fused: bool = True
    written: bool = False
    counted: dict[_Read, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class _View:
    """A value as a node sees it, through the view ``key``; ``straight``: in memory's order."""

    value: _Value
    straight: bool = True
    key: Any = None

    def reads(self) -> dict[_Read, bool]:
        if self.value.written:
            return {(self.value.buffer, self.key): self.straight}
        if self.straight:
            return self.value.reads
        return {(buffer, (key, self.key)): False for buffer, key in self.value.reads}

    def counted(self) -> dict[_Read, bool]:
        if self.value.written or self.straight:
            return self.reads() if self.value.written else self.value.counted
        return {(buffer, (key, self.key)): False for buffer, key in self.value.counted}


def kernels_of(
    graph: fx.Graph, values: Mapping[str, Any], piece: Mapping[fx.Node, int]
) -> list[Kernel]:
    """The kernels of a step graph in the order of its nodes.

    ``values`` are the (fake) values of the nodes by name if all tokens are fresh; ``piece`` numbers
    the parts that are compiled one by one.
    """
    return _Lowering(graph, values, piece).run()


class _Lowering:
    """One walk over the nodes of a graph, which collects kernels."""

    def __init__(
        self, graph: fx.Graph, values: Mapping[str, Any], piece: Mapping[fx.Node, int]
    ) -> None:
        self._graph, self._values, self._piece = graph, values, piece
        self._kernels: list[Kernel] = []
        self._seen: dict[fx.Node, _View | list[_View | None]] = {}
        self._sites: dict[fx.Node, int] = {}
        self._inner: dict[Allocation, _Value] = {}

    def run(self) -> list[Kernel]:
        for node in self._graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                buffer = node.meta.get("buffer")
                if buffer is not None and buffer.role == "ranks":
                    self._sites[node] = buffer.site
                self._seen[node] = _View(_Value(Allocation(node.name, 0, None, -1), written=True))
            elif node.op == "output":
                for view in self._operands(node):
                    self._write(view.value)
                    view.value.buffer.end = True
            else:
                self._visit(node)
        return self._kernels

    def _visit(self, node: fx.Node) -> None:
        operands = self._operands(node)
        for view in operands:  # what another piece computes comes from memory
            if view.value.buffer.piece != self._piece[node]:
                self._write(view.value)
        if node.target is operator.getitem:
            self._take(node)
            return
        value = self._values[node.name]
        outputs = list(value) if isinstance(value, (tuple, list)) else [value]
        if not any(isinstance(output, Tensor) for output in outputs):
            return  # a number
        name = operator_name(node.target)
        if name not in ("index_put", "scatter", "copy_"):
            sites = [self._sites[each] for each in node.all_input_nodes if each in self._sites]
            self._sites.update((node, site) for site in sites)
        if name == "copy_":
            self._copy(node)
        elif name == "index_put" and operands[0].value.buffer.piece < 0:
            # A cache that is updated in place.
            self._launch(node, _joined(operands[1:]), [])
            self._seen[node] = operands[0]
        elif operands and self._is_view(node, name, outputs[0], operands[0]):
            self._look(node, name, operands[0], isinstance(value, Tensor))
        elif name in _KERNELS or not name or self._is_foreign(node, name, outputs):
            self._call(node, outputs, operands)
        else:
            self._fuse(node, name, outputs[0], operands)

    def _call(self, node: fx.Node, outputs: list[Any], operands: list[_View]) -> None:
        """A kernel that is not fused: operands and results are written."""
        for view in operands:
            self._write(view.value)
        views: list[_View | None] = []
        for output in outputs:
            buffer = self._buffer(node, output) if isinstance(output, Tensor) else None
            views.append(None if buffer is None else _View(_Value(buffer, written=True)))
        reads = dict.fromkeys(_joined(operands), False)
        writes = [view.value.buffer for view in views if view is not None]
        self._launch(node, reads, writes, fused=False)
        is_one = isinstance(self._values[node.name], Tensor)
        self._seen[node] = views[0] if is_one and views[0] else views

    def _take(self, node: fx.Node) -> None:
        """An item of a node that returns several values, or several parts of one."""
        whole, at = self._seen.get(node.all_input_nodes[0]), node.args[1]
        part = whole[at] if isinstance(whole, list) and isinstance(at, int) else whole
        if isinstance(part, _View):
            is_own = isinstance(whole, list)
            self._seen[node] = part if is_own else _View(part.value, False, node.name)

    def _operands(self, node: fx.Node) -> list[_View]:
        found = (self._seen.get(operand) for operand in node.all_input_nodes)
        return [view for view in found if isinstance(view, _View)]

    def _buffer(self, node: fx.Node, output: Tensor) -> Allocation:
        return Allocation(
            node.name,
            output.numel() * output.element_size(),
            output.dtype,
            self._piece[node],
            self._sites.get(node),
        )

    def _launch(
        self,
        node: fx.Node,
        reads: dict[_Read, bool],
        writes: list[Allocation],
        *,
        fused: bool = True,
    ) -> None:
        self._kernels.append(Kernel(node.name, self._piece[node], _by_buffer(reads), writes, fused))

    def _write(self, value: _Value) -> None:
        """Materialise a value."""
        if not value.written:
            buffer = value.buffer
            self._kernels.append(
                Kernel(buffer.name, buffer.piece, _by_buffer(value.reads), [buffer], value.fused)
            )
            value.written, value.reads, value.ops = True, {}, 0

    def _copy(self, node: fx.Node) -> None:
        """Write a cache, by the kernel that computes the value if nothing else does."""
        target, source = (self._seen[operand] for operand in node.all_input_nodes[:2])
        self._seen[node] = target
        if not isinstance(target, _View) or not isinstance(source, _View):
            return
        if target.value is not source.value:
            self._launch(node, source.reads(), [])

    def _is_view(self, node: fx.Node, name: str, output: Tensor, first: _View) -> bool:
        if name in _KERNELS:
            return False
        (given, *_) = node.all_input_nodes
        whole = self._values[given.name]
        storages = {
            storage_id(x)
            for x in ([whole] if isinstance(whole, Tensor) else whole)
            if isinstance(x, Tensor)
        }
        # On a GPU attention leaves heads next to channels in memory, and so they are joined without
        # a copy.
        joins = name in ("reshape", "flatten", "contiguous") and first.value.buffer.name.startswith(
            "scaled_dot_product_attention"
        )
        return storage_id(output) in storages or joins

    def _look(self, node: fx.Node, name: str, operand: _View, is_one: bool) -> None:
        straight = operand.straight and is_one and name in _STRAIGHT
        self._seen[node] = _View(operand.value, straight, operand.key if straight else node.name)
        self._write_if_reused(node, operand.value, 0)

    def _is_foreign(self, node: fx.Node, name: str, outputs: Iterable[Any]) -> bool:
        operands = (self._values[operand.name] for operand in node.all_input_nodes)
        is_complex = any(
            isinstance(value, Tensor) and value.is_complex() for value in (*outputs, *operands)
        )
        foreign = namespace(node.target) not in ("", "aten")
        return is_complex or foreign or name.startswith(("_scaled_dot_product", "_fft"))

    def _fuse(self, node: fx.Node, name: str, output: Tensor, operands: list[_View]) -> None:
        reads, counted = _joined(operands), dict[_Read, bool]()
        for view in operands:
            counted |= view.counted()
        if name in _MOVING:
            reads, counted = dict.fromkeys(reads, False), dict.fromkeys(counted, False)
        ops = _OPS.get(name, _OPS_OF_ONE) + sum(view.value.ops for view in operands)
        is_fused = name not in _REDUCTIONS
        value = _Value(self._buffer(node, output), reads, ops, is_fused, counted=counted)
        self._seen[node] = _View(value)
        if name in _REDUCTIONS:
            self._write(value)
        else:
            self._write_if_reused(node, value, 2 if name in _NORMS else 0)  # mean and variance

    def _write_if_reused(self, node: fx.Node, value: _Value, more_reads: int) -> None:
        """Materialise a value that reads a lot and is used more than once.

        One that reads too much is a buffer for the compiler too; but if it is used once, and what
        reads it is written itself, one kernel computes both.
        """
        reads = len(value.counted) + more_reads
        users = sum(2 if operator_name(user.target) in _TWICE else 1 for user in node.users)
        if value.written or not users:
            return
        if reads > (_READS_IF_REUSED if users > 1 else _MOST_READS) or value.ops > _MOST_OPS:
            if users > 1:
                self._write(value)
            else:
                self._inner[value.buffer] = value
                value.counted, value.ops = {(value.buffer, None): True}, 0
        elif users > 1:  # it is computed for each of them, of what is written
            for buffer, _ in value.counted:
                if buffer in self._inner:
                    self._write(self._inner.pop(buffer))
            value.reads = dict(value.counted)


def _joined(operands: Iterable[_View]) -> dict[_Read, bool]:
    found: dict[_Read, bool] = {}
    for view in operands:
        found |= view.reads()
    return found


def _by_buffer(reads: Mapping[_Read, bool]) -> dict[Allocation, bool]:
    found: dict[Allocation, bool] = {}
    for (buffer, _), straight in reads.items():
        found[buffer] = found.get(buffer, True) and straight
    return found
