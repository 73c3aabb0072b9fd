"""One compiled graph for many sizes.

    a text of 12:  view(x, [2, 12, 64])      a text of 20:  view(x, [2, 20, 64])
    compiled:      view(x, [2, s, 64])

A model is analysed for the sizes of each call, and what was found holds for them: nothing has to be
proven of symbols. Its graphs are compared number by number with those that were compiled before;
where they differ in numbers only, these become symbols. Code fits other sizes if all numbers follow
from the symbols, and if what the compiler asks of these is true.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from toca_fx.lower.once import Recent
from toca_fx.lower.skeleton import Number, Sized, Values, mapped, skeleton, with_sizes
from toca_fx.torch_private import (
    ConstantSource,
    DimDynamic,
    FakeTensorMode,
    StatelessSymbolicContext,
    computed,
)

log = logging.getLogger(__name__)

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]

_MOST_GRAPHS = 512
_MOST_OF_ONE = 8  # of one graph, for sizes that do not fit each other
_MOST_EXAMPLES = 4
_SPECIAL = "a size of 0 or 1 is computed in ways of its own"


@dataclass(frozen=True)
class Fitted:
    """Code that fits: a function of the graph's inputs, and what it asks of other symbols.

    ``reason`` is why it was compiled now, although there was code for other sizes.
    """

    run: Callable[..., Any]
    conditions: tuple[sympy.Basic, ...]
    symbols: Mapping[sympy.Expr, Any]
    reason: str = ""


class _Unfit(Exception):  # noqa: N818 - no error
    """Why compiled code is not for some sizes."""


class Shared:
    """What was compiled of the graphs of one capture.

    ``expressions`` are sizes that the model makes of Dynamo's symbols, ``names`` what these are
    called. ``compiled`` counts graphs.
    """

    def __init__(
        self,
        expressions: Sequence[sympy.Expr] = (),
        names: Mapping[sympy.Symbol, str] | None = None,
    ) -> None:
        self._expressions, self._names = expressions, names or {}
        self._codes: Recent[Hashable, list[_Code]] = Recent(_MOST_GRAPHS)
        self._examples: Recent[Hashable, list[_Numbers]] = Recent(_MOST_GRAPHS)
        self._known: set[Hashable] = set()
        self.compiled = 0

    def fitted(
        self,
        what: Hashable,
        graph: Sized,
        compiler: Compile,
        others: Iterable[Sized],
    ) -> Fitted:
        """Code for ``graph``, which is ``what``: compiled for other sizes before, or else now.

        ``others`` may be the same graph for other sizes.
        """
        key, numbers = skeleton(graph)
        own, reason = _Numbers(numbers, graph.sizes, graph.ranges), ""
        codes = self._codes.get(key, [])
        for code in codes:
            try:
                return code.fitted(own)
            except (_Unfit, ArithmeticError) as found:
                reason = self._named(str(found))
        seen = self._examples.get(key, [])
        examples = [own, *seen]
        for other in others if not seen else ():
            other_key, other_numbers = skeleton(other)
            if other_key == key:
                examples.append(_Numbers(other_numbers, other.sizes, other.ranges))
                break
        if not codes and what in self._known:
            reason = "what is computed at these sizes differs in more than numbers"
        self._known.add(what)
        made, failed = self._compiled(graph, examples, compiler)
        self._codes[key] = [*codes, made][-_MOST_OF_ONE:]
        self._examples[key] = examples[:_MOST_EXAMPLES]
        if len(codes) == _MOST_OF_ONE - 1:
            log.warning(
                "toca_fx: a graph has been compiled for %d sizes that cannot share code (%s); the "
                "oldest code goes from now on",
                _MOST_OF_ONE,
                reason,
            )
        return replace(made.fitted(own), reason=failed or reason)

    def _compiled(
        self,
        graph: Sized,
        examples: Sequence[_Numbers],
        compiler: Compile,
    ) -> tuple[_Code, str]:
        """Code for all of the ``examples``, or else for the first; and why it is not for all."""
        self.compiled += 1
        try:
            return _Code(graph, examples, self._expressions, compiler), ""
        except Exception as error:
            if len(examples) == 1:
                raise
            log.debug("toca_fx: a graph cannot be compiled for all sizes", exc_info=True)
            said = next(iter(str(error).splitlines()), "")
            failed = f"symbolic sizes failed: {type(error).__name__}: {said}"
            return _Code(graph, examples[:1], (), compiler), failed

    def _named(self, text: str) -> str:
        """``text`` with the names of Dynamo's symbols."""
        for symbol, name in self._names.items():
            text = re.sub(rf"\b{symbol}\b", name, text)
        return text


@dataclass(frozen=True)
class _Numbers:
    """The numbers of a graph, in order, at some sizes."""

    all: tuple[Number, ...]
    sizes: Values
    ranges: Mapping[Any, tuple[int, int]]


class _Code:
    """A graph, compiled with symbols for the numbers that differ among ``examples``.

    The first of them is that of ``graph`` itself.
    """

    def __init__(
        self,
        graph: Sized,
        examples: Sequence[_Numbers],
        expressions: Sequence[sympy.Expr],
        compiler: Compile,
    ) -> None:
        columns = [*zip(*(example.all for example in examples), strict=True)]
        named = _named(examples, expressions)
        self._terms = [named.get(column, column[0]) for column in columns]
        own = {symbol for term in named.values() for symbol in term.free_symbols}
        # Those that stand for no size of the call are read where they are in the graph.
        self._read = {
            term: columns.index(column)
            for column, term in named.items()
            if term in own and term not in graph.sizes
        }
        self._symbols, self._ranges = graph.symbols, graph.ranges
        env = graph.mode.shape_env
        before = 0 if env is None else len(env.guards)
        values = {**graph.sizes, **{s: int(examples[0].all[at]) for s, at in self._read.items()}}
        self._sizes = _new_symbols({s: values[s] for s in sorted(own, key=str)}, graph.mode)
        self._given = [*self._sizes, *(term for term in named.values() if term not in self._sizes)]
        module, inputs = self._general(graph)
        self._run = compiler(module, inputs)
        made = {size.node.expr: s for s, size in self._sizes.items()}
        guards = [] if env is None else env.guards[before:]
        self._guards = tuple(guard.expr.xreplace(made) for guard in guards)

    def _general(self, graph: Sized) -> tuple[fx.GraphModule, list[Any]]:
        """A copy of the graph that takes sizes as further inputs, and its inputs."""
        made = {
            term: self._sizes[term] if term in self._sizes else computed(term, self._sizes)
            for term in self._given
        }
        module = fx.GraphModule(graph.module, copy.deepcopy(graph.module.graph))
        if not made:
            return module, list(graph.inputs)
        placeholders = module.graph.find_nodes(op="placeholder")
        given = {}
        with module.graph.inserting_after(placeholders[-1]):
            for number, term in reversed([*enumerate(self._given)]):
                given[term] = module.graph.placeholder(f"size_{number}")
                given[term].meta["val"] = made[term]
        terms = iter(self._terms)
        inputs = [with_sizes(value, terms, made, graph.mode) for value in graph.inputs]
        for node in module.graph.nodes:
            if node.op != "placeholder":
                node.args, node.kwargs = mapped(
                    (node.args, node.kwargs), lambda _: given.get(term := next(terms), term)
                )
        module.recompile()
        return module, [*inputs, *(made[term] for term in self._given)]

    def fitted(self, numbers: _Numbers) -> Fitted:
        """The code for a graph of the same kind with these numbers.

        Raises:
            _Unfit: it is not for them.
        """
        sizes = {**numbers.sizes, **{s: int(numbers.all[at]) for s, at in self._read.items()}}
        sizes = {symbol: sizes[symbol] for symbol in self._sizes}
        if sizes and min(sizes.values()) < 2:
            raise _Unfit(_SPECIAL)
        values = {term: computed(term, sizes) for term in self._given}
        for number, term in zip(numbers.all, self._terms, strict=True):
            if number != term and not _equal(number, values.get(term, term)):
                raise _Unfit(f"{number} is not {term}, as it was for other sizes")
        for of, (tokens, _) in numbers.ranges.items():
            if tokens > self._ranges[of][1]:
                raise _Unfit(f"{tokens} tokens may need wider indices than the compiled code has")
        most = {symbol: numbers.ranges[of][0] for symbol, of in self._symbols.items()}
        conditions = []
        for guard in self._guards:
            asked = guard.xreplace({s: sympy.Integer(size) for s, size in sizes.items()})
            if asked.free_symbols:
                conditions += [] if _holds_up_to(asked, most) else [asked]
            elif not computed(asked, {}):
                raise _Unfit(f"the compiled code asks for {guard}")
        run, more = self._run, tuple(values[term] for term in self._given)
        return Fitted(
            (lambda *given: run(*given, *more)) if more else run, tuple(conditions), self._symbols
        )


def _equal(number: Number, expected: Number) -> bool:
    """Floats may be computed in another order."""
    if isinstance(number, int):
        return type(expected) is int and number == expected
    return math.isclose(number, expected, rel_tol=1e-12)


def _holds_up_to(asked: sympy.Basic, most: Values) -> bool:
    """Whether a condition on numbers of fresh tokens only bounds them, by more than there are."""
    if not isinstance(asked, (sympy.LessThan, sympy.StrictLessThan)) or not asked.rhs.is_number:
        return False
    polynomial = asked.lhs.as_poly(*asked.free_symbols)
    grows = polynomial is not None and all(each >= 0 for each in polynomial.coeffs())
    largest = {symbol: sympy.Integer(tokens) for symbol, tokens in most.items()}
    return bool(grows and asked.xreplace(largest) == True)  # noqa: E712 - sympy's own truth


def _named(
    examples: Sequence[_Numbers], expressions: Sequence[sympy.Expr]
) -> dict[tuple[Number, ...], sympy.Expr]:
    """A term for each set of numbers that differ among the examples.

    It is one of the ``expressions`` if that gives these numbers, else made of terms before it, or
    a symbol of its own.
    """
    known: dict[tuple[Number, ...], sympy.Expr] = {}
    floats: dict[tuple[Number, ...], sympy.Expr] = {}
    # Of a length that Dynamo knows by several inputs one symbol is enough.
    first: dict[tuple[int, ...], sympy.Symbol] = {}
    alike = {
        symbol: first.setdefault(tuple(example.sizes[symbol] for example in examples), symbol)
        for symbol in examples[0].sizes
    }
    for term in (each.xreplace(alike) for each in expressions):
        values = tuple(computed(term, example.sizes) for example in examples)
        whole = all(isinstance(value, int) for value in values)
        (known if whole else floats).setdefault(values, term)
    named: dict[tuple[Number, ...], sympy.Expr] = {}
    for values in dict.fromkeys(zip(*(example.all for example in examples), strict=True)):
        if len(set(values)) > 1:
            whole = all(isinstance(value, int) for value in values)
            term = (known if whole else floats).get(values)
            if term is None:
                if not whole:
                    raise ValueError(f"it is not known how {values[0]} depends on sizes")
                own = sympy.Symbol(f"n{len(named)}", integer=True, positive=True)
                term = known[values] = _made_of(values, known) or own
            named[values] = term
    return named


def _made_of(
    values: tuple[Number, ...], known: Mapping[tuple[Number, ...], sympy.Expr]
) -> sympy.Expr | None:
    """A multiple, a product or a sum of ``known`` terms that gives ``values``."""
    for one, term in known.items():
        if all(own and value % own == 0 for value, own in zip(values, one, strict=True)):
            factors = tuple(value // own for value, own in zip(values, one, strict=True))
            if len(set(factors)) == 1:
                return term * factors[0]
            if factors in known:
                return term * known[factors]
        rest = tuple(value - own for value, own in zip(values, one, strict=True))
        if rest in known:
            return term + known[rest]
        if len(set(rest)) == 1:
            return term + rest[0]
    return None


def _new_symbols(sizes: Values, mode: FakeTensorMode) -> dict[sympy.Symbol, Any]:
    """Symbolic sizes of ``mode`` for those of an example."""
    made: dict[sympy.Symbol, Any] = {}
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    for symbol, size in sizes.items():
        if size < 2:
            raise ValueError(_SPECIAL)
        fake: Any = mode.from_tensor(
            torch.empty(size, device="meta"),
            source=ConstantSource(f"size_{symbol}"),
            symbolic_context=context,
        )
        made[symbol] = fake.shape[0]
    return made
