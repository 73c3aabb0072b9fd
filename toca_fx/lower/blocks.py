"""A step graph cut between its blocks, so that equal blocks are compiled once.

    one graph of 28 blocks  ->  before, block, block, ..., block, after     three graphs to compile

The pieces are found by the module paths of their nodes. Two are equal if they compute the same,
whatever their names: a block whose attention is reused is not equal to one whose attention is
computed. Only the residual stream, and what the model hands from block to block, crosses a cut.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.passes.split_module import split_module

from toca_fx.graph.modules import numbered_block
from toca_fx.lower.compiler import Inner
from toca_fx.lower.onload import is_offloaded, onloaded
from toca_fx.torch_private import (
    FakeTensorMode,
    computed,
    enable_python_dispatcher,
    use_lazy_graph_module,
)

aten = torch.ops.aten

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def compile_regions(
    module: fx.GraphModule,
    examples: Sequence[Any],
    compiler: Compile,
    mode: FakeTensorMode,
) -> Callable[..., Any]:
    """Compile ``module``, equal blocks once; a graph without equal blocks is compiled whole.

    ``examples`` are its inputs, fake tensors of ``mode``; ``module`` is changed. Weights that are
    away come in for the piece that reads them, and so a graph that reads such is never whole.
    """
    if isinstance(compiler, Inner) and compiler.exact and not is_offloaded():
        return _on_weights(compiler(module, list(examples)))  # nothing takes long
    pieces = cut(module)
    _hand_symbols(pieces, examples)
    kinds = _Survey(pieces, mode).kinds(examples)
    if len(set(kinds.values())) == len(kinds) and not is_offloaded():
        return _on_weights(compiler(module, list(examples)))
    compiled: dict[_Kind, Callable[..., Any]] = {}
    for name, kind in kinds.items():
        if kind not in compiled:
            piece = fx.GraphModule(kind.piece, kind.piece.graph)
            compiled[kind] = _on_weights(compiler(piece, list(kind.inputs)))
        delattr(pieces, name)
        setattr(pieces, name, compiled[kind])
    # What FX generates calls them in turn; Module.__call__ would only add to that.
    run: Callable[..., Any] = pieces.forward
    return run


def _on_weights(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: run(*onloaded(given))


def cut(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` as a sequence of calls of submodules, each of which returns a tuple.

    There is one for each block, and one for what lies between blocks. The nodes of ``module`` are
    put into the order of the pieces.
    """
    region = assign(module.graph)
    _hand_over_contiguous(module.graph, region)
    body = sorted(region, key=region.__getitem__)
    for node in module.graph.find_nodes(op="get_attr") if body else ():
        body[0].prepend(node)
    for before, after in itertools.pairwise(body):
        before.append(after)
    # Pieces get their code when they run: most are equal to others, and never do.
    with use_lazy_graph_module(True):
        pieces = split_module(module, module, region.__getitem__, keep_original_order=True)
        _return_tuples(pieces)
    return fx.GraphModule(pieces, pieces.graph)


def _hand_symbols(pieces: fx.GraphModule, examples: Sequence[Any]) -> None:
    """Give every piece the inputs that are symbols by themselves.

    A compiler can read no symbol off a size like s0 + 16.
    """
    inputs = zip(pieces.graph.find_nodes(op="placeholder"), examples, strict=True)
    symbols = [node for node, value in inputs if _is_symbol(value)]
    if not symbols:
        return
    for call in pieces.graph.find_nodes(op="call_module"):
        piece: Any = pieces.get_submodule(call.target)
        missing = [symbol for symbol in symbols if symbol not in call.args]
        last = piece.graph.find_nodes(op="placeholder")[-1:]
        with piece.graph.inserting_after(*last):
            for symbol in reversed(missing):
                piece.graph.placeholder(symbol.name)
        piece.recompile()
        call.args = (*call.args, *missing)
    pieces.recompile()


def _is_symbol(value: Any) -> bool:
    return isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol)


def _return_tuples(pieces: fx.GraphModule) -> None:
    """Make every piece return a tuple, as compilers want; FX returns a single value as it is."""
    for call in pieces.graph.find_nodes(op="call_module"):
        piece: Any = pieces.get_submodule(call.target)
        (end,) = piece.graph.find_nodes(op="output")
        if not isinstance(end.args[0], tuple):
            end.args = ((end.args[0],),)
            piece.recompile()
            with pieces.graph.inserting_after(call):
                only = pieces.graph.call_function(operator.getitem, (call, 0))
            call.replace_all_uses_with(
                only, delete_user_cb=lambda user, only=only: user is not only
            )
    pieces.recompile()


def assign(graph: fx.Graph) -> dict[fx.Node, int]:
    """The number of the piece that each node belongs to.

    It is 2 i + 1 for the i-th numbered block, and even for what lies around blocks. No node comes
    before its operands. Nodes that the rewriter added (they have no module stack) go where they are
    used, and writes behind all that read the same memory.
    """
    blocks: dict[tuple[str, int], int] = {}
    region: dict[fx.Node, int] = {}
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    for node in nodes:
        given = max((region.get(operand, 0) for operand in node.all_input_nodes), default=0)
        name, number = numbered_block(node.meta.get("path", ""))
        if not _is_original(node) or node.target is operator.getitem:
            region[node] = given
        elif number is None:
            region[node] = given + given % 2
        else:
            region[node] = max(given, 2 * blocks.setdefault((name, number), len(blocks)) + 1)
    for node in reversed(nodes):
        if not _is_original(node) and node.users:
            users = [region[user] for user in node.users if user in region]
            region[node] = min(users, default=region[node])
    for node in nodes:
        if node.target is operator.getitem:
            region[node] = region[node.args[0]]
        elif node.target is aten.copy_.default:
            region[node] = max(
                region[user]
                for operand in node.all_input_nodes
                for user in (operand, *operand.users)
                if user in region
            )
    return region


def _hand_over_contiguous(graph: fx.Graph, region: dict[fx.Node, int]) -> None:
    """Make what the first block gets contiguous, if it is transposed.

    Patch embeddings return a transposed stream, and blocks a contiguous one: the first block would
    be compiled by itself.
    """
    for node in [node for node in region if region[node] == 0]:
        users = [user for user in node.users if region.get(user, 0) > 0]
        value = node.meta.get("val")
        if users and isinstance(value, Tensor) and not value.is_contiguous() and _is_dense(value):
            with graph.inserting_after(node):
                straight = graph.call_function(aten.contiguous.default, (node,))
            region[straight] = 0
            node.replace_all_uses_with(straight, delete_user_cb=users.__contains__)


def _is_dense(value: Tensor) -> bool:
    # A tensor that is expanded, or cut out of another, has other strides than a new one like it.
    return torch.empty_like(value).stride() == value.stride()


def signature(region: fx.GraphModule, inputs: Sequence[Any]) -> object:
    """A key that is equal for pieces that can share one compiled graph.

    It is made of what a piece computes, and of the layouts of its inputs.
    """
    position = {node: at for at, node in enumerate(region.graph.nodes)}
    symbols: dict[sympy.Symbol, sympy.Symbol] = {}

    def of_size(size: Any) -> object:
        if isinstance(size, int):
            return size
        for symbol in _symbols((size,)):
            symbols.setdefault(symbol, sympy.Symbol(f"k{len(symbols)}", integer=True))
        return size.node.expr.xreplace(symbols)

    def of_input(value: Any) -> object:
        if isinstance(value, torch.SymInt):
            return of_size(value)
        if not isinstance(value, Tensor):
            return repr(value)
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return tuple(map(of_size, sizes)), value.dtype, value.device, value.requires_grad

    def of_arguments(node: fx.Node) -> str:
        given = (node.args, node.kwargs)
        return repr(fx.node.map_arg(given, lambda operand: f"%{position[operand]}"))

    def of_target(node: fx.Node) -> object:
        attribute = getattr(region, str(node.target), None) if node.op == "get_attr" else None
        # Code that an operator is given: another name in each piece.
        return signature(attribute, ()) if isinstance(attribute, fx.GraphModule) else node.target

    body = tuple(
        (node.op, of_target(node), of_arguments(node))
        for node in region.graph.nodes
        if node.op != "placeholder"
    )
    return tuple(map(of_input, inputs)), body


def _is_original(node: fx.Node) -> bool:
    return "stack" in node.meta


@dataclass(frozen=True, eq=False)
class _Kind:
    """Equal pieces: the first of them, and its inputs and outputs as fake tensors."""

    piece: fx.GraphModule
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]


class _Survey(fx.Interpreter):
    """Runs one piece of each kind on fake tensors."""

    def __init__(self, pieces: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(pieces)
        self._mode = mode
        self._known: dict[object, _Kind] = {}
        self._kinds: dict[str, _Kind] = {}

    def kinds(self, examples: Sequence[Any]) -> dict[str, _Kind]:
        """The kind of each piece, in the order of their calls."""
        self._sizes = {
            size.node.expr: size
            for value in examples
            for size in _sizes_of(value)
            if isinstance(size, torch.SymInt)
        }
        # Python's decompositions know symbols; the C++ ones of torch 2.11 (matmul's, for one) make
        # them numbers.
        with self._mode, torch.no_grad(), enable_python_dispatcher():
            self.run(*examples)
        return self._kinds

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        piece: fx.GraphModule = self.fetch_attr(target)
        sign = signature(piece, args)
        first = self._known.get(sign)
        outputs = None if first is None else self._returned(first, args)
        if outputs is None:
            outputs = super().call_module(target, args, kwargs)
        self._kinds[target] = self._known.setdefault(sign, _Kind(piece, args, outputs))
        return outputs

    def _returned(self, first: _Kind, inputs: Sequence[Any]) -> tuple[Any, ...] | None:
        """What a piece equal to ``first`` returns; None if that has to be found out."""
        own = dict(zip(_symbols_of(first.inputs), _symbols_of(inputs), strict=True))
        if not all(map(self._sizes.__contains__, own.values())):
            return None
        if not own.keys() >= set(_symbols_of(first.outputs)):
            return None
        sizes = {symbol: self._sizes[other] for symbol, other in own.items()}

        def at(size: Any) -> Any:
            return size if isinstance(size, int) else computed(size.node.expr, sizes)

        def like_first(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return at(value) if isinstance(value, torch.SymInt) else value
            shape, stride = map(at, value.shape), map(at, value.stride())
            return torch.empty_strided(
                tuple(shape), tuple(stride), dtype=value.dtype, device=value.device
            )

        with self._mode:
            return tuple(map(like_first, first.outputs))


def _sizes_of(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Tensor):
        return (*value.shape, *value.stride(), value.storage_offset())
    return (value,) if isinstance(value, torch.SymInt) else ()


def _symbols(sizes: Iterable[Any]) -> Iterator[sympy.Symbol]:
    """The symbols in sizes, in order."""
    for size in sizes:
        if isinstance(size, torch.SymInt):
            yield from sorted(size.node.expr.free_symbols, key=str)


def _symbols_of(values: Iterable[Any]) -> tuple[sympy.Symbol, ...]:
    """The symbols in the sizes of values, each once, in order."""
    return tuple(dict.fromkeys(s for value in values for s in _symbols(_sizes_of(value))))
