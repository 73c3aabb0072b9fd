"""A model's step graphs, compiled when they are first needed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from toca_fx import trace
from toca_fx.analysis import Analysis, CountedStep, like
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.plan import Modes, Plan, StepPlan
from toca_fx.policy import Policy
from toca_fx.rewrite import StepGraph

log = logging.getLogger(__name__)

Inner = str | Callable[..., Any]


class Program(Analysis):
    """The captured model for the shapes of ``inputs``: matched at once, planned and compiled when first needed."""

    def __init__(self, captured: fx.GraphModule, inputs: Sequence[Any], policy: Policy, inner: Inner) -> None:
        super().__init__(captured, inputs, policy)
        trace.verify(captured, self.aten, inputs)
        self._inner = inner
        self._steps: dict[tuple[object, ...], CompiledStep] = {}
        log.info("matched %d sites, %d near misses", len(self.matches.sites), len(self.matches.misses))

    def step(self, plan: Plan, modes: Modes) -> CompiledStep:
        """The compiled graph for steps in these modes; built at the first call, shared between plans."""
        with self._lock:
            key = (modes, plan.scored_by_attention, plan.entropies, plan.remembering)
            if key not in self._steps:
                self._steps[key] = CompiledStep(self.step_graph(plan, modes), self.aten, plan, self._inner)
            return self._steps[key]

    def step_flops(self, num_steps: int | None, step: StepPlan) -> int:
        """FLOPs of one call that did ``step`` of the plan for ``num_steps``, scoring included, but for what is hoisted."""
        return self.step(self.plan(num_steps), step.modes).flops(step)

    @cached_property
    def run_timed(self) -> Callable[..., Any]:
        """The compiled ``timed``, for one timestep."""
        module = fx.GraphModule(self.timed.module, copy.deepcopy(self.timed.module.graph))
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        inputs = [like(mode, node.meta["val"]) for node in module.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            run: Callable[..., Any] = _compiler(self._inner)(module, inputs)
        return run

    @property
    def compiled_graphs(self) -> int:
        """How many step graphs have been compiled so far."""
        return len(self._steps)


def _compiler(inner: Inner) -> Callable[..., Any]:
    return lookup_backend(inner) if isinstance(inner, str) else inner


class CompiledStep(CountedStep):
    """A step graph compiled by the inner backend, for every number of fresh tokens.

    Called with the model's inputs, the buffers of a generation and the chosen rows; returns the model's outputs.
    """

    def __init__(self, graph: StepGraph, source: fx.GraphModule, plan: Plan, inner: Inner) -> None:
        super().__init__(graph, source, plan)
        # The compiler may rewrite what it is given; ours is still needed for counting FLOPs.
        module = fx.GraphModule(graph.module, copy.deepcopy(graph.module.graph))
        # Symbols stand for sizes from 2 up; that the code made for them is right for 0 and 1 too (some steps compute no
        # token at all) is shown by tests/test_inductor.py, not by the compiler.
        with torch.no_grad():
            self._run = _compiler(inner)(module, self._examples(dynamic=True))
        if self._shapes.guards:
            conditions = ", ".join(str(guard.expr) for guard in self._shapes.guards)
            raise UnsupportedModelError(
                f'the inner backend {inner} compiled a partial step that holds only if {conditions}; use inner="inductor"'
            )

    def __call__(self, inputs: Sequence[Any], tensors: Mapping[str, Tensor]) -> Any:
        """Run the step; ``tensors`` are those of ``buffers``, of which the kept ones are written in place."""
        return self._run(*(inputs[position] for position in self.graph.kept), *(tensors[name] for name in self.graph.names))
