"""Sizes that Dynamo left symbolic: lengths of texts, heights, widths, frames, samples.

Here a graph is made for the sizes of one call, as if they had been numbers all along: what is found
in it and planned for it holds for that call. What is compiled is shared (``lower/sizes.py``), and
how sizes depend on each other is told by ``expressions``.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from toca_fx.capture.sources import input_sources
from toca_fx.graph.edit import put_value
from toca_fx.torch_private import FakeTensor, FakeTensorMode, computed, tree_leaves, tree_map

Values = Mapping[sympy.Symbol, int]

_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_NUMERIC = (torch.SymInt, torch.SymFloat)
_TRIES = 200
_SIZE = re.compile(r"(.*)\.size\(\)\[(\d+)\]$")
_MOST_OTHERS = 4
# No small ones first: half of a size, rounded, is the same for the next one.
_GRANULES = (8, 4, 2, 1, 16, 32)


class Sizes:
    """The symbols for sizes in Dynamo's graph ``captured``; false if there are none.

    ``expressions`` are the sizes that are made of them anywhere in the graph, and ``names`` are
    what users call them: ``encoder_hidden_states.shape[1]``.
    """

    def __init__(self, captured: fx.GraphModule) -> None:
        self._inputs: list[Any] = [
            node.meta.get("example_value") for node in captured.graph.find_nodes(op="placeholder")
        ]
        self._places = {
            size.node.expr: (at, axis)
            for at, value in enumerate(self._inputs)
            for axis, size in enumerate(value.shape if isinstance(value, Tensor) else [value])
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol)
        }
        sources = input_sources(captured) if self._places else ()
        self.names = {
            symbol: _name(sources[at], axis, isinstance(self._inputs[at], Tensor))
            for symbol, (at, axis) in self._places.items()
        }
        known = self._places.keys()
        values = (node.meta.get("example_value") for node in captured.graph.nodes if known)
        found = (size.node.expr for value in values for size in _sizes_of(value, _NUMERIC))
        self.expressions = tuple(dict.fromkeys(e for e in found if e.free_symbols <= known))

    def __bool__(self) -> bool:
        return bool(self._places)

    def of(self, inputs: Sequence[Any]) -> dict[sympy.Symbol, int]:
        """The sizes of a call with these inputs."""
        return {
            symbol: int(value.shape[axis] if isinstance(value := inputs[at], Tensor) else value)
            for symbol, (at, axis) in self._places.items()
        }

    def others(self, sizes: Values) -> Iterator[dict[sympy.Symbol, int]]:
        """A few other ``sizes`` at which the graph is right too, best first.

        As many as can be are others, and differ by different numbers.
        """
        return itertools.islice(self._others(sizes), _MOST_OTHERS) if sizes else iter(())

    def _others(self, sizes: Values) -> Iterator[dict[sympy.Symbol, int]]:
        env = next(size.node.shape_env for value in self._inputs for size in _sizes_of(value))
        asked = (env.replace(guard.expr) for guard in env.guards)
        guards = [each for each in asked if each.free_symbols <= sizes.keys()]

        def hold(trial: Values) -> bool:
            ranges = all(
                env.var_to_range[symbol].lower <= size <= env.var_to_range[symbol].upper
                for symbol, size in trial.items()
                if symbol in env.var_to_range
            )
            return ranges and all(computed(guard, trial) for guard in guards)

        # Of one length Dynamo may know by several inputs, with a symbol for each.
        alike: dict[int, list[sympy.Symbol]] = {}
        for symbol, size in sizes.items():
            alike.setdefault(size, []).append(symbol)
        each, together = [[symbol] for symbol in sizes], list(alike.values())
        # More samples may be computed in another way.
        batch = {
            symbol
            for symbol, (at, axis) in self._places.items()
            if axis == 0 and isinstance(own := self._inputs[at], Tensor) and own.dim() > 2
        }
        for steps in (_multiples, _any_steps):
            for groups in (each, together):
                of_one_batch = [group for group in groups if batch.isdisjoint(group)]
                for own in (groups, of_one_batch)[: 1 + (of_one_batch != groups)]:
                    found = filter(hold, _moved(sizes, own, steps))
                    yield from itertools.islice(found, _MOST_OTHERS // 2)
        free = [group for group in together if any(map(hold, _moved(sizes, [group], _multiples)))]
        if free:
            yield from filter(hold, _moved(sizes, free, _multiples))

    def examples(self, inputs: Sequence[Any], sizes: Values, mode: FakeTensorMode) -> list[Any]:
        """``inputs`` as they would be at ``sizes``: numbers, and fake tensors of ``mode``."""
        known = _evaluated(sizes)
        return [
            value if own is None or not _is_symbolic(own) else _at(own, known, mode)
            for value, own in zip(inputs, self._inputs, strict=True)
        ]

    def fixed(
        self, captured: fx.GraphModule, sizes: Values, mode: FakeTensorMode
    ) -> fx.GraphModule:
        """``captured`` for ``sizes``: a copy, whose nodes say what they return there."""
        if not self:
            return captured
        module = fx.GraphModule(captured, copy.deepcopy(captured.graph))
        module.meta, known = captured.meta, _evaluated(sizes)
        for node in module.graph.nodes:
            value = node.meta.get("example_value")
            if value is None or not _is_symbolic(value) or not _is_known(value, self._places):
                continue
            node.meta["example_value"] = found = tree_map(
                lambda each: _at(each, known, mode), value
            )
            if all(isinstance(each, (int, float)) for each in tree_leaves(found)):
                put_value(node, found)
        for node in reversed(module.graph.nodes):
            numbers = tree_leaves(node.meta.get("example_value"))
            spare = node.op in ("call_function", "call_method") and not node.users
            if spare and numbers and all(isinstance(each, _NUMBERS) for each in numbers):
                module.graph.erase_node(node)
        module.recompile()
        return module


def _name(source: str, axis: int, of_tensor: bool) -> str:
    """What is called ``source``, or one of its axes if it is a tensor."""
    size = _SIZE.match(source)
    words = re.findall(r"\w+", size[1] if size else source)
    name = words[-1] if words else "?"
    if size:
        return f"{name}.shape[{size[2]}]"
    return f"{name}.shape[{axis}]" if of_tensor else name


def _sizes_of(value: Any, kinds: Any = torch.SymInt) -> Iterator[Any]:
    """The symbolic ones among the sizes of tensors, and among numbers, in a value."""
    for leaf in tree_leaves(value):
        for size in (*leaf.shape, *leaf.stride()) if isinstance(leaf, Tensor) else [leaf]:
            if isinstance(size, kinds):
                yield size


def _is_symbolic(value: Any) -> bool:
    return any(isinstance(each, _SYMBOLIC) for each in tree_leaves(value)) or any(
        True for _ in _sizes_of(value)
    )


def _is_known(value: Any, known: Mapping[sympy.Symbol, Any]) -> bool:
    """Whether all of a value follows from the sizes of the inputs."""
    leaves = tree_leaves(value)
    numbers = [leaf for leaf in leaves if isinstance(leaf, _SYMBOLIC)]
    symbols = {s for each in (*numbers, *_sizes_of(value)) for s in each.node.expr.free_symbols}
    plain = all(type(leaf) is FakeTensor for leaf in leaves if isinstance(leaf, Tensor))
    return plain and symbols <= known.keys()


def _evaluated(sizes: Values) -> Callable[[sympy.Expr], Any]:
    """What gives the numbers of expressions; the same few come again and again."""
    return functools.cache(lambda expression: computed(expression, sizes))


def _at(value: Any, known: Callable[[sympy.Expr], Any], mode: FakeTensorMode) -> Any:
    """A number, or a fake tensor of ``mode``, as it is where expressions have ``known`` numbers."""
    if isinstance(value, _SYMBOLIC):
        return known(value.node.expr)
    if not isinstance(value, Tensor):
        return value
    shape, stride = (
        [size if isinstance(size, int) else known(size.node.expr) for size in of]
        for of in (value.shape, value.stride())
    )
    with mode:
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)


def _moved(
    sizes: Values,
    groups: Sequence[Sequence[sympy.Symbol]],
    steps: Callable[[int], Iterator[Sequence[int]]],
) -> Iterator[dict[sympy.Symbol, int]]:
    """``sizes`` with others for ``groups`` of symbols, each group by a step of its own."""
    for step in steps(len(groups)):
        by = {symbol: own for group, own in zip(groups, step, strict=True) for symbol in group}
        yield {symbol: size + by.get(symbol, 0) for symbol, size in sizes.items()}


def _multiples(count: int) -> Iterator[Sequence[int]]:
    """So many different steps that are divisible alike."""
    for sign in (1, -1):
        for granule in _GRANULES:
            yield [sign * granule * (at + 1) for at in range(count)]


def _any_steps(count: int) -> Iterator[Sequence[int]]:
    chosen = random.Random(0)
    for _ in range(_TRIES):
        granules = [chosen.choice((1, -1)) * chosen.choice(_GRANULES) for _ in range(count)]
        yield [granule * chosen.randint(1, 7) for granule in granules]
