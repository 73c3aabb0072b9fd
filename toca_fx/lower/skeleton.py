"""What a graph computes but for its numbers, and these: graphs of other sizes have others."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from toca_fx.torch_private import FakeTensorMode

Values = Mapping[sympy.Symbol, int]
Number = int | float

_OWN = itertools.count()


@dataclass(frozen=True)
class Sized:
    """A graph for the ``sizes`` of a call, by the symbols that Dynamo has for them.

    ``inputs`` are fake tensors of ``mode``; symbols among their sizes stay what they are. They are
    ``symbols``, with what each stands for: that has ``ranges``, how large it may be here, and up to
    which size the compiler is told that it may be.
    """

    module: fx.GraphModule
    inputs: Sequence[Any]
    sizes: Values
    mode: FakeTensorMode
    symbols: Mapping[sympy.Expr, Any] = field(default_factory=dict)
    ranges: Mapping[Any, tuple[int, int]] = field(default_factory=dict)


def skeleton(graph: Sized) -> tuple[Hashable, tuple[Number, ...]]:
    """What a graph computes, but for its numbers, and these in order.

    The numbers of its inputs come first: shapes and strides.
    """
    numbers: list[Number] = []
    position = {node: at for at, node in enumerate(graph.module.graph.nodes)}

    def take(leaf: Any) -> str:
        if isinstance(leaf, fx.Node):
            return f"%{position[leaf]}"
        numbers.append(leaf)
        return "#" if isinstance(leaf, int) else "#."

    def of_input(value: Any) -> object:
        if not isinstance(value, Tensor):
            return repr(value)
        count = sum(1 for _ in _sizes(value))
        numbers.extend(_sizes(value))
        return count, value.dim(), value.dtype, value.device

    inputs = [of_input(value) for value in graph.inputs]
    body = []
    for node in graph.module.graph.nodes:
        if node.op == "get_attr":  # a table or code of this graph alone, whatever it is like
            target: object = f"own {next(_OWN)}"
        else:
            target = "" if node.op == "placeholder" else str(node.target)
        arguments = mapped((node.args, node.kwargs), take, nodes=True)
        body.append((node.op, target, arguments))
    return hashlib.sha256(repr((inputs, body)).encode()).digest(), tuple(numbers)


def _sizes(value: Tensor) -> Iterator[int]:
    """The sizes of a tensor that are numbers."""
    return (size for size in (*value.shape, *value.stride()) if isinstance(size, int))


def with_sizes(
    value: Any, terms: Iterator[Any], made: Mapping[sympy.Expr, Any], mode: FakeTensorMode
) -> Any:
    """An input with the sizes that ``terms`` say; those that are symbols already stay."""
    if not isinstance(value, Tensor):
        return value
    sizes = [
        made.get(term := next(terms), term) if isinstance(size, int) else size
        for size in (*value.shape, *value.stride())
    ]
    with mode:
        return torch.empty_strided(
            sizes[: value.dim()], sizes[value.dim() :], dtype=value.dtype, device=value.device
        )


def mapped(argument: Any, change: Callable[[Any], Any], *, nodes: bool = False) -> Any:
    """Arguments of a node with other numbers, and other ``nodes`` if it is said; in order."""
    if isinstance(argument, (tuple, list)):
        found = [mapped(each, change, nodes=nodes) for each in argument]
        return tuple(found) if isinstance(argument, tuple) else found
    if isinstance(argument, dict):
        return {key: mapped(each, change, nodes=nodes) for key, each in argument.items()}
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return slice(*(mapped(each, change, nodes=nodes) for each in parts))
    is_taken = _is_number(argument) or (nodes and isinstance(argument, fx.Node))
    return change(argument) if is_taken else argument


def _is_number(value: Any) -> bool:
    """Whether a value is a number that may follow from sizes: no flag, no NaN."""
    return type(value) is int or (type(value) is float and math.isfinite(value) and value != 0)
