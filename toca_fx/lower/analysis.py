"""A captured model under a policy: what is known before anything is compiled or run."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor, fx

from toca_fx.graph import roles
from toca_fx.lower.cost import StepCost, nbytes_of
from toca_fx.lower.fake_inputs import FakeInputs, like
from toca_fx.lower.flops import FlopCounter
from toca_fx.lower.once import once, traced_once
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.plan import Plan, StepPlan
from toca_fx.plan.planner import Planner
from toca_fx.plan.schedule import Modes
from toca_fx.rewrite.hoist import find_hoistable
from toca_fx.rewrite.step import rewrite
from toca_fx.rewrite.step_graph import StepGraph, extract
from toca_fx.rewrite.tensors import Tensors
from toca_fx.torch_private import FakeTensorMode, compiling


@dataclass(frozen=True)
class Inputs:
    """Positions among the inputs of a graph, and the ``device`` of the first tensor that it uses.

    Of the tensors that the graph uses, those in ``state`` stay where they are from call to call,
    and those in ``varying`` do not. ``timestep`` and ``latents`` are None if none were recognised,
    ``conditions`` are tensors, used or not: captions, labels, masks.
    """

    state: tuple[int, ...]
    varying: tuple[int, ...]
    timestep: int | None
    latents: int | None
    conditions: tuple[int, ...]
    device: torch.device
    on_one_device: bool


def _inputs_of(graph: fx.Graph) -> Inputs:
    nodes = graph.find_nodes(op="placeholder")
    used = [
        at for at, node in enumerate(nodes) if node.users and isinstance(node.meta["val"], Tensor)
    ]
    state = set(roles.positions(graph, "state"))
    devices = [nodes[at].meta["val"].device for at in used]
    timestep, latents = roles.positions(graph, "timestep"), roles.positions(graph, "latents")
    return Inputs(
        tuple(at for at in used if at in state),
        tuple(at for at in used if at not in state),
        timestep[0] if timestep else None,
        latents[0] if latents else None,
        roles.positions(graph, "condition"),
        devices[0] if devices else torch.device("cpu"),
        len(set(devices)) <= 1,
    )


@dataclass(frozen=True)
class Wanted:
    """The hoisted values that are computed for a step.

    ``conditions`` says whether they are looked after. ``part`` computes the timed ones ``names``,
    which takes ``flops``.
    """

    conditions: bool
    names: tuple[str, ...]
    part: StepGraph
    flops: int


def _output_of(graph: fx.Graph, names: Collection[str]) -> int | None:
    """The position of the first output that is one of the nodes ``names``; None: none is."""
    (returned,) = graph.find_nodes(op="output")
    outputs = returned.args[0]
    if isinstance(outputs, fx.Node):
        return None
    found = (at for at, one in enumerate(outputs) if isinstance(one, fx.Node) and one.name in names)
    return next(found, None)


class Analysis:
    """The model's graph for one set of input shapes, with its matches and plans.

    ``aten`` is the graph, ``hoisted`` are the values that its steps need not compute, ``output`` is
    the position of the output that is made of latents (None: there is none), ``at_sizes`` are the
    sizes for which it holds, by Dynamo's symbols.
    """

    def __init__(self, aten: fx.GraphModule, planner: Planner) -> None:
        self.aten, self.matches = aten, planner.matches
        self.at_sizes: Mapping[sympy.Symbol, int] = aten.meta.get("sizes", {})
        self.settings, self.plan = planner.settings, planner.plan
        self.uncached = planner.uncached
        self.hoisted = find_hoistable(aten.graph, self.matches.sites, self.settings.hoisting_bytes)
        self.inputs = _inputs_of(aten.graph)
        self.output = _output_of(aten.graph, [site.output for site in self.matches.outputs])
        self._counter = FlopCounter()
        self._wanted: dict[frozenset[str], Wanted] = {}
        self._costs: tuple[Plan, dict[Modes, StepCost]] | None = None

    def step_graph(self, plan: Plan, modes: Modes) -> StepGraph:
        """The graph for steps in these modes."""
        with compiling():
            return rewrite(self.aten, plan.step(modes, self.hoisted.names))

    @traced_once
    def sizes(self) -> tuple[tuple[str, str], ...]:
        """The role and the shape of each tensor that may be another one at another call."""
        nodes = self.aten.graph.find_nodes(op="placeholder")
        values = ((node.meta["role"], node.meta.get("val")) for node in nodes)
        tensors = ((role, value) for role, value in values if isinstance(value, Tensor))
        return tuple((role, str(tuple(value.shape))) for role, value in tensors if role != "state")

    @traced_once
    def dtype(self) -> torch.dtype | None:
        """That of the latents; None: none were recognised."""
        at = self.inputs.latents
        nodes = self.aten.graph.find_nodes(op="placeholder")
        return None if at is None else nodes[at].meta["val"].dtype

    @traced_once
    def code(self) -> bytes:
        """What the model computes of its tensors, the same for every capture of it at these shapes.

        Where latents lie otherwise, or some sizes have become symbolic, Dynamo captures again.
        """
        nodes = self.aten.graph.nodes
        tensors = (node for node in nodes if isinstance(node.meta.get("val"), Tensor))
        numbers = {node: f"%{at}" for at, node in enumerate(tensors)}
        calls = [
            (str(node.target), fx.map_arg((node.args, node.kwargs), numbers.get))
            for node in nodes
            if node.op in ("call_function", "output")
        ]
        inputs = [
            (tuple(node.meta["val"].shape), node.meta["val"].dtype, node.meta["role"])
            for node in nodes
            if node.op == "placeholder" and node in numbers
        ]
        return hashlib.sha256(repr((calls, inputs)).encode()).digest()

    @traced_once
    def conditions(self) -> StepGraph:
        """The part that depends on conditions only; it returns ``hoisted.conditions``."""
        return extract(self.aten, self.hoisted.conditions, checked=True)

    @traced_once
    def timed(self) -> StepGraph:
        """The part that depends on the timestep as well; it returns ``hoisted.timed``.

        The values of ``hoisted.conditions`` are inputs of it. It may be run for many timesteps at
        once, which checks cannot be.
        """
        return extract(self.aten, self.hoisted.timed, given=self.hoisted.conditions)

    @traced_once
    def first_block(self) -> StepGraph:
        """The part that computes ``matches.first_block``, of the inputs alone."""
        return extract(self.aten, self.matches.first_block)

    @traced_once
    def first_block_flops(self) -> int:
        """FLOPs of ``first_block``."""
        return self._flops_of(self.first_block.module)

    def gate_flops(self, plan: Plan) -> int:
        """FLOPs of what the gate of ``plan`` runs ahead of each step, if it has one."""
        said = plan.settings.gate
        runs = said is not None and said.probes and self.matches.first_block
        return self.first_block_flops if runs else 0

    def wanted(self, step: StepGraph) -> Wanted:
        """What is computed for a step; nothing, if it reads no hoisted value.

        A step that runs no block reads the modulation of the output layers, if any: where no more
        than half of the timed values are read, the others are left out.
        """
        return once(self._wanted, step.hoisted, lambda: self._wants(step.hoisted))

    def _wants(self, read: frozenset[str]) -> Wanted:
        whole, conditions = self.hoisted.timed, self.hoisted.conditions
        names = tuple(name for name in whole if name in read)
        if 2 * len(names) > len(whole):
            names, part, flops = whole, self.timed, self.hoisted_flops[1]
        else:
            part = extract(self.aten, names, given=conditions)
            flops = self._flops_of(part.module)
        return Wanted(bool(part.buffers) or not read.isdisjoint(conditions), names, part, flops)

    def wanted_part(self, wanted: Wanted) -> StepGraph:
        """The part that computes the same timed values as that of ``wanted`` of other sizes."""
        return extract(self.aten, wanted.names, given=self.hoisted.conditions)

    @traced_once
    def uncached_flops(self) -> int:
        """FLOPs of one run of the model as it was captured."""
        return self._flops_of(self.aten)

    @traced_once
    def uncached_bytes(self) -> int:
        """Bytes that one run of the model as it was captured has to read: weights and inputs."""
        inputs = self.aten.graph.find_nodes(op="placeholder")
        return nbytes_of(node.meta.get("val") for node in inputs)

    @traced_once
    def hoisted_flops(self) -> tuple[int, int]:
        """FLOPs of ``conditions``, and of ``timed`` for one timestep."""
        return self._flops_of(self.conditions.module), self._flops_of(self.timed.module)

    @traced_once
    def hoisted_bytes(self) -> tuple[int, int]:
        """Bytes of the values of ``conditions``, and of ``timed`` for one timestep."""
        sizes = {name: value.nbytes for name, value in self.hoisted_examples.items()}
        conditions = sum(sizes[name] for name in self.hoisted.conditions)
        return conditions, sum(sizes[name] for name in self.hoisted.timed)

    @traced_once
    def hoisted_examples(self) -> dict[str, Tensor]:
        """Fake tensors like the hoisted values, by name; of a mode that nothing is traced in."""
        names, mode = set(self.hoisted.names), FakeTensorMode()
        nodes = self.aten.graph.nodes
        return {node.name: like(mode, node.meta["val"]) for node in nodes if node.name in names}

    def table_fits(self, timesteps: int) -> bool:
        """Whether hoisted values for so many timesteps fit into what the policy allows them."""
        conditions, timed = self.hoisted_bytes
        return conditions + timed * timesteps <= self.settings.hoisting_bytes

    def queued_because(self, nbytes: int, beside: int = 0) -> str:
        """Why steps are queued, and not recorded, by the policy; "" if they are recorded.

        ``nbytes`` is what their memories take, hoisted values included; ``beside`` are bytes that
        other recordings of the model hold already.
        """
        most = self.settings.recording_bytes
        if beside + nbytes <= most:
            return ""
        held = f" beside {beside / 2**20:.0f} of other generations" if beside else ""
        return (
            f"{nbytes / 2**20:.0f} MiB of memories{held}, and recorded steps keep "
            f"{most / 2**20:.0f} at most (recording.memory)"
        )

    def flops(self, plan: Plan) -> int:
        """FLOPs of a generation, scoring included; conditions are computed once.

        Where a gate decides they are those of the fewest full steps that there may be.
        """
        done = sum(self.step_flops(plan, step) for step in plan.fewest)
        return done + self.hoisted_flops[0]

    def step_flops(self, plan: Plan, step: StepPlan) -> int:
        """FLOPs of one step of ``plan``, of its gate, and of the timed values that it reads."""
        cost = self.costs(plan)[step.modes]
        return cost.flops(step) + self.wanted(cost.graph).flops + self.gate_flops(plan)

    def nbytes(self, plan: Plan) -> int:
        """Bytes of the caches, histories, scores and counters of a generation."""
        kept = self.kept(plan)
        counters = (kept[Buffer("score", i)] for i in plan.scored)  # of the same size
        return nbytes_of((*kept.values(), *counters))

    def kept(self, plan: Plan) -> dict[Buffer, Tensor]:
        """Fake tensors like those that a generation of a plan keeps.

        Their mode is nobody else's: while a thread traces on fake tensors of one mode, all of them
        say that they are on the device "meta".
        """
        made = Tensors(self.aten, plan)
        with compiling(), FakeTensorMode():
            return {buffer: made.new(buffer) for buffer in plan.kept}

    def costs(self, plan: Plan) -> dict[Modes, StepCost]:
        """The costs of the step graphs of ``plan``, which are not compiled for it.

        The costs of the latest plan are kept.
        """
        with compiling():
            if self._costs is None or self._costs[0] is not plan:
                modes = dict.fromkeys(step.modes for step in plan.steps)
                self._costs = plan, {each: self._cost(plan, each) for each in modes}
            return self._costs[1]

    def _cost(self, plan: Plan, modes: Modes) -> StepCost:
        graph = self.step_graph(plan, modes)
        return StepCost(graph, FakeInputs(graph, self.aten, plan), plan, self._counter)

    def _flops_of(self, module: fx.GraphModule) -> int:
        """FLOPs of one run of a graph on the fake values of its placeholders."""
        placeholders = module.graph.find_nodes(op="placeholder")
        values = [node.meta.get("val") for node in placeholders]
        return sum(self._counter.count(module, values).values())
