"""A model's step graphs, compiled when they are first needed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from toca_fx import buffers, trace
from toca_fx.analysis import Analysis, CountedStep, like
from toca_fx.buffers import Buffers
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.few_rows import use_few_rows
from toca_fx.inner import Inner
from toca_fx.plan import Modes, Plan, StepPlan
from toca_fx.policy import Policy
from toca_fx.regions import compile_regions
from toca_fx.replay import compile_for_replay
from toca_fx.rewrite import StepGraph

log = logging.getLogger(__name__)


class Program(Analysis):
    """The captured model for the shapes of ``inputs``: matched at once, planned and compiled when first needed."""

    def __init__(self, captured: fx.GraphModule, inputs: Sequence[Any], policy: Policy, inner: Inner) -> None:
        super().__init__(captured, inputs, policy)
        if self.aten.meta["writes"]:
            trace.verify(captured, self.aten, inputs)
        self._inner = inner
        self._steps: dict[tuple[object, ...], CompiledStep] = {}
        self._idle: dict[tuple[str, ...], list[dict[str, Tensor]]] = {}
        log.info("matched %d sites, %d near misses", len(self.matches.sites), len(self.matches.misses))

    def step(self, plan: Plan, modes: Modes) -> CompiledStep:
        """The compiled graph for steps in these modes; built at the first call, shared between plans."""
        with self._lock:
            key = (modes, plan.scored_by_attention, plan.entropies, plan.remembering, plan.runs)
            if key not in self._steps:
                self._steps[key] = CompiledStep(self.step_graph(plan, modes), self.aten, plan, self._inner)
            return self._steps[key]

    def step_flops(self, num_steps: int | None, step: StepPlan) -> int:
        """FLOPs of one call that did ``step`` of the plan for ``num_steps``, scoring included, but for what is hoisted."""
        return self.step(self.plan(num_steps), step.modes).flops(step)

    def step_bytes(self, num_steps: int | None, step: StepPlan) -> int:
        """Bytes of what one call that did ``step`` has to read or write: weights, inputs and caches."""
        return self.step(self.plan(num_steps), step.modes).nbytes(step)

    @cached_property
    def run_timed(self) -> Callable[..., Any]:
        """The compiled ``timed``, for one timestep."""
        module = fx.GraphModule(self.timed.module, copy.deepcopy(self.timed.module.graph))
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        inputs = [like(mode, node.meta["val"]) for node in module.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            return self._inner(module, inputs)

    def lend(self, plan: Plan) -> dict[str, Tensor]:
        """The tensors that a generation keeps (see ``buffers``)."""
        names = tuple(buffers.kept(plan))
        with self._lock:
            idle = self._idle.get(names)
            held = idle.pop() if idle else None
        # Normal tensors, whatever mode the caller is in: an inference tensor could not be updated outside of it.
        with torch.inference_mode(False), torch.no_grad():
            made = Buffers(self.aten, plan)
            if held is None:
                return {name: made.new(name) for name in names}
            for name in names:
                made.clear(name, held[name])
            return held

    def take_back(self, lent: dict[str, Tensor]) -> None:
        """A generation is over: where a CUDA graph was recorded on its tensors, the next one gets the same."""
        if self._inner.cuda_graphs:
            with self._lock:
                self._idle.setdefault(tuple(lent), []).append(lent)

    @property
    def compiled_graphs(self) -> int:
        """How many step graphs have been compiled so far."""
        return len(self._steps)


class CompiledStep(CountedStep):
    """A step graph compiled by the inner backend, for every number of fresh tokens.

    Called with the model's inputs, the buffers of a generation and the chosen rows; returns the model's outputs.
    """

    def __init__(self, graph: StepGraph, source: fx.GraphModule, plan: Plan, inner: Inner) -> None:
        super().__init__(graph, source, plan)
        # The compiler may rewrite what it is given; ours is still needed for counting FLOPs.
        module = fx.GraphModule(graph.module, copy.deepcopy(graph.module.graph))
        if inner.backend == "inductor":
            use_few_rows(module.graph, set().union(*graph.fresh_nodes.values()))
            module.recompile()
        # Symbols stand for sizes from 2 up; that the code made for them is right for 0 and 1 too (some steps compute no
        # token at all) is shown by tests/test_inductor.py, not by the compiler.
        examples = self._examples(dynamic=True)
        with torch.no_grad():
            if inner.cuda_graphs:
                self._run = compile_for_replay(module, examples, self._static(), inner)
            else:
                self._run = compile_regions(module, examples, inner, self._mode)
        if self._shapes.guards:
            conditions = ", ".join(str(guard.expr) for guard in self._shapes.guards)
            raise UnsupportedModelError(
                f'the inner backend {inner.backend} compiled a partial step that holds only if {conditions}; use inner="inductor"'
            )

    def __call__(self, inputs: Sequence[Any], tensors: Mapping[str, Tensor]) -> Any:
        """Run the step; ``tensors`` are those of ``buffers``, of which the kept ones are written in place."""
        return self._run(*(inputs[position] for position in self.graph.kept), *(tensors[name] for name in self.graph.names))

    def _static(self) -> set[int]:
        """Positions of the inputs that stay where they are from call to call: parameters and what a generation keeps."""
        placeholders = self._source.graph.find_nodes(op="placeholder")
        names = set(buffers.kept(self._plan))
        of_model = {at for at, position in enumerate(self.graph.kept) if placeholders[position].meta["role"] == "state"}
        return of_model | {len(self.graph.kept) + at for at, name in enumerate(self.graph.names) if name in names}
