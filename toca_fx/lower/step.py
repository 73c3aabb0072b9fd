"""One step graph, compiled."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from toca_fx.graph.ops import aten
from toca_fx.kernels.few_rows import LINEAR
from toca_fx.lower.blocks import compile_regions
from toca_fx.lower.compiler import Inner
from toca_fx.lower.cost import StepCost
from toca_fx.lower.fake_inputs import FakeInputs
from toca_fx.lower.flops import FlopCounter
from toca_fx.lower.onload import onloaded
from toca_fx.lower.sizes import Shared
from toca_fx.lower.skeleton import Sized, Values
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.plan import Plan
from toca_fx.plan.schedule import Modes
from toca_fx.rewrite.step_graph import StepGraph
from toca_fx.torch_private import compiling

log = logging.getLogger(__name__)

_MOST_SPECIAL = 8  # numbers of fresh tokens that a step is compiled for one by one


class CompiledStep:
    """A step graph compiled by the inner backend, for every number of fresh tokens.

    ``conditions`` are those that the compiler's code puts on numbers of fresh tokens, none as a
    rule. A call takes the model's inputs and the tensors of a generation, chosen rows among them,
    and returns the model's outputs.
    """

    def __init__(
        self,
        graph: StepGraph,
        source: fx.GraphModule,
        plan: Plan,
        inner: Inner,
        shared: Shared | None = None,
        sizes: Values | None = None,
        others: Iterable[Sized] = (),
        modes: Modes = (),
    ) -> None:
        self.graph = graph
        self._fake = FakeInputs(graph, source, plan)
        self.cost = StepCost(graph, self._fake, plan, FlopCounter())
        self._inner, self._plan = inner, plan
        self._of_inputs, self._of_tensors = picker(graph.kept), picker(graph.buffers)
        self._special: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._holds: dict[tuple[int, ...], bool] = {}
        # Symbols stand for sizes from 2 up; that the code made for them is right for 0 and 1 too
        # (some steps compute no token at all) is shown by test_inductor.py, not by the compiler.
        found = self._fake.symbolic(sizes or {})
        fitted = (shared or Shared()).fitted(modes, found, self._lowered, others)
        self._run, self._symbols = fitted.run, fitted.symbols
        self.conditions, self.reason = fitted.conditions, fitted.reason
        if self.conditions:
            self._warn()

    def _warn(self) -> None:
        """Log a warning of the conditions."""
        stand_for = ", ".join(
            f"where {symbol} is the number of fresh tokens of `{self._plan.sites[of.site].path}`"
            for symbol, of in self._symbols.items()
        )
        log.warning(
            "toca_fx: %s asks for %s, %s; partial steps with other numbers are compiled one by "
            "one, and more than %d of them run uncompiled. `R: {multiple: ...}` in the policy "
            "makes them fewer",
            self._inner.backend,
            " and ".join(map(str, self.conditions)),
            stand_for,
            _MOST_SPECIAL,
        )

    def __call__(self, inputs: Sequence[Any], tensors: Mapping[Buffer, Tensor]) -> Any:
        """Run the step; of the tensors the kept ones are written in place."""
        given = (*self._of_inputs(inputs), *self._of_tensors(tensors))
        run = self._run if not self.conditions else self._for_counts(tensors)
        return run(*given)

    def _for_counts(self, tensors: Mapping[Buffer, Tensor]) -> Callable[..., Any]:
        """The callable for these numbers of fresh tokens, where there are conditions."""
        counts = {buffer: len(tensors[buffer]) for buffer in self._symbols.values()}
        key = tuple(counts.values())
        if key not in self._holds:
            numbers = {symbol: counts[buffer] for symbol, buffer in self._symbols.items()}
            self._holds[key] = self._hold_for(numbers)
        if self._holds[key]:
            return self._run
        with compiling():
            if key not in self._special:
                if len(self._special) == _MOST_SPECIAL:
                    return lambda *given: self.graph.module(*onloaded(given))
                self._special[key] = self._compile(self._fake.of_counts(counts))
            return self._special[key]

    def _hold_for(self, numbers: Mapping[sympy.Expr, int]) -> bool:
        """Whether the conditions hold for these numbers."""
        try:
            # sympy's own truth is not True.
            return all(one.subs(numbers) == True for one in self.conditions)  # noqa: E712
        except (ArithmeticError, TypeError):  # a remainder by 0
            return False

    def _compile(self, examples: list[Any]) -> Callable[..., Any]:
        # The compiler may rewrite what it is given; ours is still needed for counting FLOPs.
        graph = copy.deepcopy(self.graph.module.graph)
        return self._lowered(fx.GraphModule(self.graph.module, graph), examples)

    def _lowered(self, module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        """Compile the graph, or what has become of it for all sizes."""
        if self._inner.backend == "inductor":
            use_few_rows(module.graph, set().union(*self.graph.fresh_nodes.values()))
        with compiling(), torch.no_grad():
            return compile_regions(module, examples, self._inner, self._fake.mode)


def use_few_rows(graph: fx.Graph, fresh: Collection[str]) -> None:
    """Replace linear layers on fresh tokens by those of ``kernels/few_rows.py``.

    ``fresh`` names the nodes that work on fresh tokens only.
    """
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        weight, *bias = node.args[1:]
        layer = [operand for operand in (weight, *bias) if operand is not None]
        if node.name in fresh and _is_plain(node) and all(map(_is_plain, layer)):
            node.target = LINEAR
            node.args = (node.args[0], weight, bias[0] if bias else None)


def _is_plain(node: fx.Node) -> bool:
    # The fake value of a layer is that for all tokens.
    value = node.meta["val"]
    on_cpu = value.device.type == "cpu" and value.dtype == torch.float32
    return bool(on_cpu and value.is_contiguous())


def picker(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """A function that returns the items at ``keys`` of a sequence or mapping, as a tuple."""
    if len(keys) > 1:
        return operator.itemgetter(*keys)
    return lambda values: tuple(values[key] for key in keys)
