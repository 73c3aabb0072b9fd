"""Code that is compiled once for graphs that differ in numbers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from toca_fx.lower.sizes import Fitted, Shared, _equal, _holds_up_to
from toca_fx.lower.skeleton import Sized
from toca_fx.torch_private import FakeTensorMode, ShapeEnv

TOKENS = sympy.Symbol("s1", integer=True, positive=True)

Compiled = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


@pytest.fixture
def compiled() -> list[list[Any]]:
    """The inputs of each graph that was compiled."""
    return []


def compiler(found: list[list[Any]]) -> Compiled:
    def compile_(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(inputs)
        return module.forward

    return compile_


def sized(function: Callable[[Tensor], Any], sizes: Mapping[sympy.Symbol, int]) -> Sized:
    """``function`` of [2, tokens, 4], as a graph for so many tokens."""
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    with mode:
        given = torch.empty(2, sizes[TOKENS], 4)
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(given)
    return Sized(module, [given], sizes, mode)


def halves(x: Tensor) -> Any:
    """A view by rows, and the mean over as many tokens as there are."""
    batch, tokens, width = x.shape
    return (x.reshape(batch * tokens, width) * 2, x.sum(1) / (tokens / 8), x[:, tokens // 2 :])


def fit(
    shared: Shared,
    found: list[list[Any]],
    tokens: int,
    function: Callable[[Tensor], Any] = halves,
    others: Iterable[int] = (),
) -> Fitted:
    return shared.fitted(
        "it",
        sized(function, {TOKENS: tokens}),
        compiler(found),
        (sized(function, {TOKENS: other}) for other in others),
    )


def check(fitted: Fitted, tokens: int, function: Callable[[Tensor], Any] = halves) -> None:
    x = torch.randn(2, tokens, 4)
    for got, expected in zip(fitted.run(x), function(x), strict=True):
        assert torch.equal(got, expected)


def test_sizes_are_symbols_if_the_graph_is_known_for_others(compiled: list[list[Any]]) -> None:
    shared = Shared((TOKENS, TOKENS / 8))
    for tokens in (12, 20, 7, 300):
        fitted = fit(shared, compiled, tokens, others=[31])
        check(fitted, tokens)
        assert not fitted.reason
    assert len(compiled) == shared.compiled == 1
    (inputs,) = compiled
    assert isinstance(inputs[0].shape[1], torch.SymInt)
    assert inputs[0].shape[2] == 4


def test_without_others_the_second_size_tells(compiled: list[list[Any]]) -> None:
    """Whole numbers are read where they are; what they have to do with each other is tried out."""

    def rows(x: Tensor) -> Any:
        return (x.reshape(-1, 4)[: x.shape[1] // 3], x[:, 1:].flatten(0, 1).expand(3, -1, -1))

    shared = Shared()
    for tokens in (12, 20, 7, 300):
        check(fit(shared, compiled, tokens, rows), tokens, rows)
    assert 2 <= len(compiled) <= 3


def test_a_float_that_follows_from_no_size_is_a_graph_of_its_own(
    compiled: list[list[Any]],
) -> None:
    shared = Shared((TOKENS,))
    first, second = (fit(shared, compiled, tokens) for tokens in (12, 20))
    check(first, 12)
    check(second, 20)
    assert "symbolic sizes failed: ValueError" in second.reason
    assert not any(isinstance(inputs[0].shape[1], torch.SymInt) for inputs in compiled)


def test_other_graphs_share_nothing(compiled: list[list[Any]]) -> None:
    shared = Shared((TOKENS, TOKENS / 8))
    functions = (halves, lambda x: halves(x + 1), lambda x: halves(x.flip(1)))
    for function in functions:
        check(fit(shared, compiled, 12, function, [20]), 12, function)
    check(fit(shared, compiled, 20, functions[1]), 20, functions[1])
    assert len(compiled) == 3
    assert "differs in more than numbers" in fit(shared, compiled, 12, lambda x: (x,)).reason


def test_what_the_compiler_asks_is_asked_of_other_sizes(compiled: list[list[Any]]) -> None:
    """Its reason has the name that users have for a size."""
    shared = Shared((TOKENS,), {TOKENS: "x.shape[1]"})

    def double(x: Tensor) -> Any:
        return (x * 2,)

    def asking(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(inputs)
        if isinstance(inputs[0].shape[1], torch.SymInt):
            bool(inputs[0].shape[1] % 4 == 0)
        return module.forward

    def fitted(tokens: int) -> Fitted:
        other = sized(double, {TOKENS: tokens + 5})
        return shared.fitted("it", sized(double, {TOKENS: tokens}), asking, [other])

    assert not fitted(12).reason
    assert not fitted(32).reason
    assert "x.shape[1]" in fitted(13).reason
    assert not fitted(15).reason
    assert len(compiled) == 2


def added(table: Tensor, x: Tensor) -> Any:
    return (x + table,)


def test_tables_in_a_graph_are_its_own() -> None:
    """What is known by where it lies may be another by now, and compilers keep copies."""
    shared, table = Shared((TOKENS,)), torch.empty(4)

    def keeps_a_copy(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        return copy.deepcopy(module).forward

    for number in range(3):
        function = functools.partial(added, table.fill_(number))
        graph = sized(function, {TOKENS: 12})
        check(shared.fitted("it", graph, keeps_a_copy, ()), 12, function)


def test_a_size_of_one_is_another(compiled: list[list[Any]]) -> None:
    shared = Shared((TOKENS,))

    def double(x: Tensor) -> Any:
        return (x * 2,)

    check(fit(shared, compiled, 12, double, [20]), 12, double)
    one = fit(shared, compiled, 1, double)
    check(one, 1, double)
    assert "0 or 1" in one.reason
    assert len(compiled) == 2


def test_what_cannot_be_compiled_with_symbols_is_compiled_without(
    compiled: list[list[Any]],
) -> None:
    def refuses(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if any(isinstance(value, torch.SymInt) for value in inputs):
            raise RuntimeError("no symbols")
        return compiler(compiled)(module, inputs)

    shared, function = Shared((TOKENS, TOKENS / 8)), halves
    for tokens in (12, 20):
        graph, other = sized(function, {TOKENS: tokens}), sized(function, {TOKENS: 31})
        fitted = shared.fitted("it", graph, refuses, [other])
        check(fitted, tokens)
        assert "no symbols" in fitted.reason
    assert len(compiled) == 2


def test_few_are_kept_of_one_graph(
    compiled: list[list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    shared = Shared()
    for tokens in range(4, 24, 2):
        check(fit(shared, compiled, tokens), tokens)
    assert "compiled for 8 sizes that cannot share code" in caplog.text
    assert max(map(len, shared._codes.values())) == 8


def test_whole_numbers_are_equal_or_not() -> None:
    """However large: 2**63 - 1 is the end of a slice that has none."""
    assert _equal(2**60, 2**60)
    assert not _equal(2**60, 2**60 + 1)
    assert not _equal(3, 3.0)
    assert _equal(0.1 + 0.2, 0.3)


def test_bounds_that_no_step_reaches_are_no_conditions() -> None:
    """On a GPU inductor asks that 32 bits are enough for an index."""
    k, other = sympy.symbols("k other", integer=True, positive=True)
    bound = 2**31 - 1
    assert _holds_up_to(sympy.Le(3072 * k, bound), {k: 4096})
    assert not _holds_up_to(sympy.Le(3072 * k, bound), {k: 2**21})
    assert not _holds_up_to(sympy.Le(4096 * k - k**2, bound), {k: 2})
    assert not _holds_up_to(sympy.Eq(k, 4), {k: 4})
    assert not _holds_up_to(sympy.Le(k * other, bound), {k: 4})
