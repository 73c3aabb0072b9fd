"""A captured model at one set of input shapes, under a policy: what is known of it before anything
is compiled or run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    StrictMinMaxConstraint,
)
from torch.utils._sympy.value_ranges import ValueRanges

from toca_fx.capture import aten as trace
from toca_fx.lower.flops import Autocast, columns_flops, count_flops
from toca_fx.match.matcher import match
from toca_fx.plan import buffers
from toca_fx.plan.buffers import Buffers
from toca_fx.plan.plan import Modes, Plan, StepPlan, make_plan
from toca_fx.policy import Policy
from toca_fx.rewrite.hoist import Part, extract, find_hoistable, nbytes_of
from toca_fx.rewrite.step import StepGraph, rewrite
from toca_fx.runtime.selector import spatial_of

_INT32_MAX = torch.iinfo(torch.int32).max


class Analysis:
    """The graph of a model for the shapes of ``inputs``, its sites, its plans, and what its steps
    need not compute.
    """

    def __init__(self, captured: fx.GraphModule, inputs: Sequence[Any], policy: Policy) -> None:
        self.policy = policy
        self.aten = trace.to_aten(captured, inputs)
        self.matches = match(self.aten.graph)
        self.aspect = aspect_of(inputs)
        self.hoisted = find_hoistable(
            self.aten.graph, self.matches.sites, policy.hoisting.memory_bytes
        )
        self._plans: dict[int, Plan] = {}
        self._autocast = Autocast()
        self._lock = threading.RLock()
        self._counted: tuple[Plan, dict[Modes, CountedStep]] | None = None

    def plan(self, num_steps: int | None) -> Plan:
        """The plan for a generation of ``num_steps`` model calls (None: the policy's own count)."""
        total = self.policy.sampler.steps if num_steps is None else num_steps
        with self._lock:
            if total not in self._plans:
                self._plans[total] = make_plan(self.matches, self.policy, total)
            return self._plans[total]

    def step_graph(self, plan: Plan, modes: Modes) -> StepGraph:
        """The graph for steps in these modes."""
        grids = {
            i: spatial_of(plan, i, self.aspect, self.policy.source) for i in plan.inside(modes)
        }
        shared = self.policy.guidance.selection == "shared"
        return rewrite(
            self.aten,
            plan,
            modes,
            shared=shared,
            spatial_of=grids.__getitem__,
            hoisted=self.hoisted.names,
        )

    @cached_property
    def conditions(self) -> Part:
        """What depends on conditions only."""
        return extract(self.aten, self.hoisted.conditions)

    @cached_property
    def timed(self) -> Part:
        """What depends on the timestep as well, given the conditions."""
        return extract(self.aten, self.hoisted.timed, given=self.hoisted.conditions)

    @cached_property
    def uncached_flops(self) -> int:
        """FLOPs of one run of the model as it was captured."""
        with self._autocast.again():
            return _flops(self.aten)

    @cached_property
    def uncached_bytes(self) -> int:
        """Bytes of what one run of the model as it was captured has to read: weights and inputs."""
        return _nbytes(
            node.meta.get("val") for node in self.aten.graph.find_nodes(op="placeholder")
        )

    @cached_property
    def hoisted_flops(self) -> tuple[int, int]:
        """FLOPs of ``conditions``, and of ``timed`` for one timestep."""
        with self._autocast.again():
            return _flops(self.conditions.module), _flops(self.timed.module)

    @cached_property
    def hoisted_bytes(self) -> tuple[int, int]:
        """Bytes of the values of ``conditions``, and of ``timed`` for one timestep."""
        sizes = {
            node.name: nbytes_of(node)
            for node in self.aten.graph.nodes
            if node.name in self.hoisted.names
        }
        return sum(sizes[name] for name in self.hoisted.conditions), sum(
            sizes[name] for name in self.hoisted.timed
        )

    def table_fits(self, timesteps: int) -> bool:
        """Whether the values of so many timesteps fit into the memory that the policy allows for
        what is hoisted.
        """
        conditions, timed = self.hoisted_bytes
        return conditions + timed * timesteps <= self.policy.hoisting.memory_bytes

    def queued_because(self, nbytes: int, beside: int = 0) -> str:
        """Why the policy has steps queued whose memories (hoisted values included) take ``nbytes``;
        "" if it has them recorded.

        ``beside`` are bytes that other recordings of the model hold already.
        """
        most = self.policy.recording.memory_bytes
        if beside + nbytes <= most:
            return ""
        held = f" beside {beside / 2**20:.0f} of other generations" if beside else ""
        return f"{nbytes / 2**20:.0f} MiB of memories{held}, and recorded steps keep {most / 2**20:.0f} at most (recording.memory)"

    def flops(self, plan: Plan) -> int:
        """FLOPs of a generation, scoring included; conditions are computed once."""
        counted = self.counted(plan)
        conditions, timed = self.hoisted_flops
        return sum(counted[step.modes].flops(step) + timed for step in plan.steps) + conditions

    def nbytes(self, plan: Plan) -> int:
        """Bytes of the caches, scores and counters of a generation."""
        made = Buffers(self.aten, plan)
        with FakeTensorMode():
            kept = sum(made.new(name).nbytes for name in buffers.kept(plan))
            counters = sum(made.new(f"score:{i}").nbytes for i in plan.scored)
        return kept + counters

    def counted(self, plan: Plan) -> dict[Modes, CountedStep]:
        """The step graphs of ``plan``, none of them compiled; those of the plan that was asked for
        last are kept.
        """
        if self._counted is None or self._counted[0] is not plan:
            modes = dict.fromkeys(step.modes for step in plan.steps)
            self._counted = (
                plan,
                {
                    each: CountedStep(self.step_graph(plan, each), self.aten, plan, {})
                    for each in modes
                },
            )
        return self._counted[1]


def _flops(module: fx.GraphModule) -> int:
    return sum(
        count_flops(
            module, [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
        ).values()
    )


def _nbytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


class CountedStep:
    """A step graph and its FLOPs, for every number of fresh tokens. Nothing is compiled or run.

    ``values`` takes what its nodes compute if all tokens are fresh (fake tensors, by name), once
    the FLOPs have been counted.
    """

    def __init__(
        self,
        graph: StepGraph,
        source: fx.GraphModule,
        plan: Plan,
        values: dict[str, Any] | None = None,
    ) -> None:
        self.graph, self.values = graph, values
        self._autocast = Autocast()
        # Every K has a symbol of its own.
        self._shapes = ShapeEnv(duck_shape=False)
        self._mode = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)
        self._source, self._plan = source, plan
        self._symbols: dict[sympy.Expr, str] = {}

    def flops(self, step: StepPlan) -> int:
        """FLOPs of one run with the fresh tokens of ``step``, scoring included as far as it is
        done.
        """
        fixed, per_site = self._flops
        unread = 0 if step.read else sum(map(columns_flops, self.graph.module.graph.nodes))
        return (
            fixed
            - unread
            + sum(
                whole * step.fresh[i] // self._plan.sites[i].tokens for i, whole in per_site.items()
            )
        )

    def nbytes(self, step: StepPlan) -> int:
        """Bytes that one run of ``step`` has to read or write at least: its inputs, but for weights
        that no token passes through.
        """
        idle = {
            name
            for i, names in self.graph.fresh_nodes.items()
            if not step.fresh[i]
            for name in names
        }
        inputs = self.graph.module.graph.find_nodes(op="placeholder")
        used = [any(user.name not in idle for user in node.users) for node in inputs]
        return _nbytes(value for value, read in zip(self._examples(), used, strict=True) if read)

    @cached_property
    def _flops(self) -> tuple[int, dict[int, int]]:
        """FLOPs that do not depend on K, and per site those of computing all of its tokens (they
        are linear in K).
        """
        with self._autocast.again():
            flops = count_flops(self.graph.module, self._examples(), self.values)
        per_site = {
            i: sum(flops.get(name, 0) for name in names)
            for i, names in self.graph.fresh_nodes.items()
        }
        return sum(flops.values()) - sum(per_site.values()), per_site

    def _examples(self, count: Callable[[str], Any] | None = None) -> list[Any]:
        """Fake inputs in call order; ``count`` gives the number of fresh tokens for ``ranks:i``,
        perhaps a symbol (None: all).
        """
        placeholders = self._source.graph.find_nodes(op="placeholder")
        examples = [
            like(self._mode, placeholders[position].meta["val"]) for position in self.graph.kept
        ]
        made, given = Buffers(self._source, self._plan), buffers.given(self._plan, self.graph.modes)
        for name in self.graph.names:
            ranks = name in given and name.startswith("ranks")
            number = (
                count(name)
                if ranks and count is not None
                else self._tokens(name)
                if name in given
                else None
            )
            with self._mode:
                examples.append(made.new(name) if number is None else made.example(name, number))
        return examples

    def _tokens(self, name: str) -> int:
        return self._plan.sites[buffers.site_of(name)].tokens

    def _symbol(self, name: str) -> Any:
        """A symbol for the number of fresh tokens of a site: anything up to all of them.

        The range lets a compiler prove what it would guard otherwise: that 32 bits are enough for
        an index. Where it can prove nothing it goes by the example, and for all tokens it takes 64
        bits if any number of tokens needs them.
        """
        tokens, fresh = self._tokens(name), self.graph.fresh_nodes[buffers.site_of(name)]
        values = (
            node.meta.get("val") for node in self.graph.module.graph.nodes if node.name in fresh
        )
        wide = any(isinstance(value, Tensor) and value.numel() > _INT32_MAX for value in values)
        # It must not be 0 or 1, which would be taken for constants.
        example = torch.empty(max(2, tokens if wide else tokens // 8), device="meta")
        range_ = StrictMinMaxConstraint(warn_only=False, vr=ValueRanges(0, max(2, tokens)))
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[range_]
        )
        size: Any = self._mode.from_tensor(
            example, source=ConstantSource(name.replace(":", "_")), symbolic_context=context
        ).shape[0]
        self._symbols[size.node.expr] = name
        return size


def like(mode: FakeTensorMode, value: Any) -> Any:
    """A fake tensor of ``mode`` like ``value``; what is no tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )


def aspect_of(inputs: Sequence[Any]) -> tuple[int, int] | None:
    """Height and width of the latents: the first four-dimensional floating-point input that is no
    parameter.
    """
    for value in inputs:
        if (
            isinstance(value, Tensor)
            and not isinstance(value, torch.nn.Parameter)
            and value.dim() == 4
            and value.is_floating_point()
        ):
            return value.shape[-2], value.shape[-1]
    return None
