"""One captured graph at one set of input shapes: its sites, its plans, and its compiled step graphs."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from toca_fx import buffers, trace
from toca_fx.buffers import Buffers
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.flops import count_flops
from toca_fx.match import match
from toca_fx.plan import Modes, Plan, StepPlan, make_plan
from toca_fx.policy import Policy
from toca_fx.rewrite import StepGraph, rewrite
from toca_fx.select import spatial_of

log = logging.getLogger(__name__)

Inner = str | Callable[..., Any]


class Program:
    """The captured model for the shapes of ``inputs``: matched at once, planned and compiled when first needed."""

    def __init__(self, captured: fx.GraphModule, inputs: Sequence[Any], policy: Policy, inner: Inner) -> None:
        self.policy, self._inner = policy, inner
        self.aten = trace.to_aten(captured, inputs)
        trace.verify(captured, self.aten, inputs)
        self.matches = match(self.aten.graph)
        self.aspect = aspect_of(inputs)
        self._plans: dict[int | None, Plan] = {}
        self._steps: dict[tuple[object, ...], CompiledStep] = {}
        self._lock = threading.RLock()
        log.info("matched %d sites, %d near misses", len(self.matches.sites), len(self.matches.misses))

    def plan(self, num_steps: int | None) -> Plan:
        """The plan for a generation of ``num_steps`` model calls (None: the policy's own count)."""
        with self._lock:
            if num_steps not in self._plans:
                self._plans[num_steps] = make_plan(self.matches, self.policy, num_steps)
            return self._plans[num_steps]

    def step(self, plan: Plan, modes: Modes) -> CompiledStep:
        """The compiled graph for steps in these modes; built at the first call, shared between plans."""
        with self._lock:
            key = (modes, plan.scored_by_attention, plan.entropies, plan.remembering)
            if key not in self._steps:
                graph = step_graph(self.aten, plan, modes, self.policy, self.aspect)
                self._steps[key] = CompiledStep(graph, self.aten, plan, self._inner)
            return self._steps[key]

    def flops(self, num_steps: int | None, step: StepPlan) -> int:
        """FLOPs of one call that did ``step`` of the plan for ``num_steps``, scoring included."""
        return self.step(self.plan(num_steps), step.modes).flops(step)

    @property
    def compiled_graphs(self) -> int:
        """How many step graphs have been compiled so far."""
        return len(self._steps)

    @cached_property
    def uncached_flops(self) -> int:
        """FLOPs of one run of the model as it was captured."""
        return graph_flops(self.aten)


def step_graph(aten: fx.GraphModule, plan: Plan, modes: Modes, policy: Policy, aspect: tuple[int, int] | None) -> StepGraph:
    """The graph for steps in these modes. ``aspect`` is height and width of the latents."""
    grids = {i: spatial_of(plan, i, aspect, policy.source) for i in plan.inside(modes)}
    return rewrite(aten, plan, modes, shared=policy.guidance.selection == "shared", spatial_of=grids.__getitem__)


def graph_flops(aten: fx.GraphModule) -> int:
    """FLOPs of one run of the model as it was captured."""
    inputs = [node.meta.get("val") for node in aten.graph.find_nodes(op="placeholder")]
    return sum(count_flops(aten, inputs).values())


class CountedStep:
    """A step graph and its FLOPs, for every number of fresh tokens. Nothing is compiled or run."""

    def __init__(self, graph: StepGraph, source: fx.GraphModule, plan: Plan) -> None:
        self.graph = graph
        # Every K has a symbol of its own.
        self._shapes = ShapeEnv(duck_shape=False)
        self._mode = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)
        self._source, self._plan = source, plan

    def flops(self, step: StepPlan) -> int:
        """FLOPs of one run with the fresh tokens of ``step``, scoring included."""
        fixed, per_site = self._flops
        return fixed + sum(whole * step.fresh[i] // self._plan.sites[i].tokens for i, whole in per_site.items())

    @cached_property
    def _flops(self) -> tuple[int, dict[int, int]]:
        """FLOPs that do not depend on K, and per site those of computing all of its tokens (they are linear in K)."""
        flops = count_flops(self.graph.module, self._examples(dynamic=False))
        per_site = {i: sum(flops.get(name, 0) for name in names) for i, names in self.graph.fresh_nodes.items()}
        return sum(flops.values()) - sum(per_site.values()), per_site

    def _examples(self, *, dynamic: bool) -> list[Any]:
        """Fake inputs in call order; the number of fresh tokens is a symbol (or, if not ``dynamic``, all tokens)."""
        placeholders = self._source.graph.find_nodes(op="placeholder")
        examples = [self._like(placeholders[position].meta["val"]) for position in self.graph.kept]
        made, given = Buffers(self._source, self._plan), buffers.given(self._plan, self.graph.modes)
        with self._mode:
            kept = {name: made.new(name) for name in self.graph.names if name not in given}
        return examples + [kept[name] if name in kept else self._given(made, name, dynamic) for name in self.graph.names]

    def _like(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with self._mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    def _given(self, made: Buffers, name: str, dynamic: bool) -> Tensor:
        tokens = self._plan.sites[buffers.site_of(name)].tokens
        # The hint only guides the compiler; it must not be 0 or 1, which would be taken for constants.
        example = made.example(name, max(2, tokens // 8) if dynamic else tokens)
        sizes = [DimDynamic.STATIC] * example.dim()
        if dynamic and not name.startswith("known"):
            sizes[-1] = DimDynamic.DYNAMIC
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return self._mode.from_tensor(example, source=ConstantSource(name.replace(":", "_")), symbolic_context=context)


class CompiledStep(CountedStep):
    """A step graph compiled by the inner backend, for every number of fresh tokens.

    Called with the model's inputs, the buffers of a generation and the chosen rows; returns the model's outputs.
    """

    def __init__(self, graph: StepGraph, source: fx.GraphModule, plan: Plan, inner: Inner) -> None:
        super().__init__(graph, source, plan)
        compiler = lookup_backend(inner) if isinstance(inner, str) else inner
        # The compiler may rewrite what it is given; ours is still needed for counting FLOPs.
        module = fx.GraphModule(graph.module, copy.deepcopy(graph.module.graph))
        # Symbols stand for sizes from 2 up; that the code made for them is right for 0 and 1 too (some steps compute no
        # token at all) is shown by tests/test_inductor.py, not by the compiler.
        with torch.no_grad():
            self._run = compiler(module, self._examples(dynamic=True))
        if self._shapes.guards:
            conditions = ", ".join(str(guard.expr) for guard in self._shapes.guards)
            raise UnsupportedModelError(
                f'the inner backend {inner} compiled a partial step that holds only if {conditions}; use inner="inductor"'
            )

    def __call__(self, inputs: Sequence[Any], tensors: Mapping[str, Tensor]) -> Any:
        """Run the step; ``tensors`` are those of ``buffers``, of which the kept ones are written in place."""
        return self._run(*(inputs[position] for position in self.graph.kept), *(tensors[name] for name in self.graph.names))


def aspect_of(inputs: Sequence[Any]) -> tuple[int, int] | None:
    """Height and width of the latents: the first four-dimensional floating-point input that is no parameter."""
    for value in inputs:
        if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) and value.dim() == 4 and value.is_floating_point():
            return value.shape[-2], value.shape[-1]
    return None
