"""Weights that lie elsewhere between calls, brought in for what computes with them.

A graph's inputs are then *stubs*: tensors like the weights, without memory. Whatever computes with
inputs asks for them here; where nothing is offloaded that is the inputs themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from toca_fx.torch_private import tree_leaves, tree_map


class Onloader(Protocol):
    """Brings weights in during one call of a model, and takes them away until its end.

    ``moved_bytes`` is how much it has brought from elsewhere so far.
    """

    moved_bytes: int

    def onload(self, values: Sequence[Any]) -> list[Any]:
        """``values`` with weights in the place of stubs; they stay until other ones are asked for.

        Others may be taken away.
        """

    def as_stubs(self, values: Sequence[Any]) -> Sequence[Any]:
        """``values`` with stubs in the place of weights that are in."""


_now: ContextVar[Onloader | None] = ContextVar("toca_fx_onloader", default=None)


@contextmanager
def onloading(onloader: Onloader) -> Iterator[None]:
    """The calls inside are given stubs, and ``onloader`` has the weights."""
    token = _now.set(onloader)
    try:
        yield
    finally:
        _now.reset(token)


def onloaded(values: Sequence[Any], at: Iterable[int] | None = None) -> Sequence[Any]:
    """``values`` to compute with; if ``at`` is given, only those at these positions are needed."""
    now = _now.get()
    if now is None:
        return values
    if at is None:
        return now.onload(values)
    places, found = tuple(at), list(values)
    for place, value in zip(places, now.onload([values[place] for place in places]), strict=True):
        found[place] = value
    return found


def as_stubs(values: Sequence[Any]) -> Sequence[Any]:
    """``values`` by which a call is known, wherever its weights lie: see ``onloaded``."""
    now = _now.get()
    return values if now is None else now.as_stubs(values)


def run_part(part: fx.GraphModule, *given: Any) -> Any:
    """Run a part of a graph; weights that are away come in one after the other, as they are read.

    Hoisted values are made of weights all over the model.
    """
    return part(*given) if _now.get() is None else _ByNode(part).run(*given)


def run_rows(part: fx.GraphModule, rows: int, *given: Any) -> list[Tensor]:
    """Run a part of a graph row by row, for so many of them; [rows, ...] of each of its outputs.

    Of ``given`` an ``Each`` has one value for each row. Weights are brought in once for all.
    """
    outputs = _ByRow(part, rows).run(*given)
    return [torch.stack(each if isinstance(each, Each) else [each] * rows) for each in outputs]


class Each(list[Any]):
    """A value for each row. It is no container to torch's trees."""


class _ByNode(fx.Interpreter):
    """Runs a graph on stubs."""

    extra_traceback = False  # says where in our own code

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = tree_leaves((args, kwargs))
        real = dict(zip(map(id, leaves), onloaded(leaves), strict=True))
        args, kwargs = tree_map(lambda leaf: real[id(leaf)], (args, kwargs))
        return super().call_function(target, args, kwargs)


class _ByRow(_ByNode):
    """Runs each operator for one row after the other, where rows differ."""

    def __init__(self, part: fx.GraphModule, rows: int) -> None:
        super().__init__(part)
        self._rows = rows

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(leaf, Each) for leaf in leaves):
            return super().call_function(target, args, kwargs)
        shared = [leaf for leaf in leaves if not isinstance(leaf, Each)]
        real = dict(zip(map(id, shared), onloaded(shared), strict=True))

        def of_row(row: int, leaf: Any) -> Any:
            return leaf[row] if isinstance(leaf, Each) else real[id(leaf)]

        found = Each()
        for row in range(self._rows):
            own, named = tree_map(functools.partial(of_row, row), (args, kwargs))
            found.append(target(*own, **named))
        return found


def is_offloaded() -> bool:
    """Whether weights lie elsewhere between calls of the model that is being called."""
    return _now.get() is not None


def moved_bytes() -> int:
    """Bytes of weights that this call of the model has brought in so far."""
    now = _now.get()
    return 0 if now is None else now.moved_bytes
