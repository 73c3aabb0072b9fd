"""A model's step graphs, compiled when they are first needed."""

from __future__ import annotations

import copy
import logging
import operator
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from toca_fx.capture import aten as trace
from toca_fx.kernels.few_rows import use_few_rows
from toca_fx.lower.blocks import compile_regions
from toca_fx.lower.compiler import Inner
from toca_fx.lower.cost import Analysis, CountedStep, like
from toca_fx.lower.cuda_graphs import Recordings, recorder_for
from toca_fx.lower.hoisted_values import HoistedValues
from toca_fx.plan import buffers
from toca_fx.plan.buffers import Buffers
from toca_fx.plan.plan import Modes, Plan, StepPlan
from toca_fx.policy import Policy
from toca_fx.rewrite.step import StepGraph
from toca_fx.runtime.selector import Selector
from toca_fx.runtime.storage import Storage
from toca_fx.runtime.watch import Watch

log = logging.getLogger(__name__)

_MOST_SPECIAL = 8  # numbers of fresh tokens that a step is compiled for one by one


class Program(Analysis):
    """The captured model for the shapes of ``inputs``: matched at once, planned and compiled when
    first needed.
    """

    def __init__(
        self, captured: fx.GraphModule, inputs: Sequence[Any], policy: Policy, inner: Inner
    ) -> None:
        super().__init__(captured, inputs, policy)
        if self.aten.meta["writes"]:
            trace.verify(captured, self.aten, inputs)
        self._inner = inner
        self._steps: dict[tuple[object, ...], CompiledStep] = {}
        self._idle: dict[tuple[int, int], list[Storage]] = {}
        self._recorded: weakref.WeakSet[Storage] = weakref.WeakSet()
        self._seen: set[Hashable] = set()
        self._watches: list[Watch] = []
        self._schedules: set[tuple[float, ...]] = set()
        nodes = self.aten.graph.find_nodes(op="placeholder")
        used = [
            at
            for at, node in enumerate(nodes)
            if node.users and isinstance(node.meta["val"], Tensor)
        ]
        self._fixed = [at for at in used if nodes[at].meta["role"] == "state"]
        self._varying = [at for at in used if nodes[at].meta["role"] != "state"]
        self._device = nodes[used[0]].meta["val"].device if used else torch.device("cpu")
        self._recorder = recorder_for(self._device)
        self._classes = {type(inputs[at]) for at in self._fixed}
        log.info(
            "matched %d sites, %d near misses", len(self.matches.sites), len(self.matches.misses)
        )

    def step(self, plan: Plan, modes: Modes) -> CompiledStep:
        """The compiled graph for steps in these modes; built at the first call, shared between
        plans.
        """
        with self._lock:
            key = (modes, plan.scored_by_attention, plan.entropies, plan.remembering, plan.runs)
            if key not in self._steps:
                self._steps[key] = CompiledStep(
                    self.step_graph(plan, modes), self.aten, plan, self._inner
                )
            return self._steps[key]

    def step_flops(self, num_steps: int | None, step: StepPlan) -> int:
        """FLOPs of one call that did ``step`` of the plan for ``num_steps``, scoring included, but
        for what is hoisted.
        """
        return self.step(self.plan(num_steps), step.modes).flops(step)

    def step_bytes(self, num_steps: int | None, step: StepPlan) -> int:
        """Bytes of what one call that did ``step`` has to read or write: weights, inputs and
        caches.
        """
        return self.step(self.plan(num_steps), step.modes).nbytes(step)

    @cached_property
    def run_timed(self) -> Callable[..., Any]:
        """The compiled ``timed``, for one timestep."""
        module = fx.GraphModule(self.timed.module, copy.deepcopy(self.timed.module.graph))
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        inputs = [
            like(mode, node.meta["val"]) for node in module.graph.find_nodes(op="placeholder")
        ]
        with torch.no_grad():
            return self._inner(module, inputs)

    def lend(self, plan: Plan, timesteps: int) -> Storage:
        """What a generation keeps (see ``buffers``), for ``timesteps`` known timesteps; 0: they are
        not known, or do not fit.
        """
        steps = timesteps if self.table_fits(timesteps) else 0
        with self._lock:
            idle = self._idle.get((id(plan), steps))
            held = idle.pop() if idle else None
        # Normal tensors, whatever mode the caller is in: an inference tensor could not be updated
        # outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if held is None:
                return self._new_storage(plan, steps)
            if self._recorder is not None:
                self._recorder.after(
                    held.mark
                )  # the last generation may have run on another stream
            held.clear()
            return held

    def _new_storage(self, plan: Plan, steps: int) -> Storage:
        made = Buffers(self.aten, plan)
        kept = {name: made.new(name) for name in buffers.kept(plan)}
        values = {
            node.name: node.meta["val"]
            for node in self.aten.graph.nodes
            if node.name in self.hoisted.names
        }
        hoisted, selector = (
            HoistedValues(self.hoisted, values, steps),
            Selector(plan, self.policy, kept, self.aspect),
        )
        storage = Storage((id(plan), steps), kept, hoisted, selector)
        if self._recorder is not None:
            with self._lock:
                storage.reason = self._queued_because(storage)
                if not storage.reason:
                    storage.recordings = Recordings(
                        self._recorder, self._fixed, self._varying, self._seen
                    )
                    self._recorded.add(storage)
        return storage

    def _queued_because(self, storage: Storage) -> str:
        """Why steps on this storage are not recorded; "" if they are."""
        if self._inner.records is False:
            return "the inner backend or its mode says so"
        if storage.selector.draws:
            return "scores.random draws numbers"
        nodes = self.aten.graph.find_nodes(op="placeholder")
        if not self._classes <= {Tensor, nn.Parameter}:
            return "a parameter is a tensor of a class of its own"
        if any(
            nodes[at].meta["val"].device != self._device for at in (*self._fixed, *self._varying)
        ):
            return "an input is on another device"
        if self._inner.records:
            return ""
        if self.queued_because(storage.total_bytes, self._recorded_bytes):
            self._idle.clear()  # of generations of other lengths
        return self.queued_because(storage.total_bytes, self._recorded_bytes)

    @property
    def _recorded_bytes(self) -> int:
        return sum(storage.total_bytes for storage in self._recorded)

    def take_back(self, lent: Storage) -> None:
        """A generation is over: what its steps were recorded on is kept for the next one, anything
        else goes back to the allocator.
        """
        if lent.recordings is None or self._recorder is None:
            return
        with self._lock:
            if len(lent.recordings):
                lent.mark = self._recorder.mark()
                self._idle.setdefault(lent.key, []).append(lent)
            else:
                self._recorded.discard(lent)

    def confirm(self, timesteps: Tensor) -> None:
        """The model was called at the first of ``timesteps``: they are in its units."""
        self._schedules.add(tuple(timesteps.tolist()))

    def is_confirmed(self, timesteps: Tensor) -> bool:
        """Whether ``timesteps`` have been confirmed."""
        return tuple(timesteps.tolist()) in self._schedules

    def leave_watch(self, watch: Watch) -> None:
        """A generation is over, and the device has not come as far."""
        with self._lock:
            self._watches.append(watch)

    def take_watches(self) -> list[Watch]:
        """The watches that earlier generations left."""
        with self._lock:
            found, self._watches = self._watches, []
            return found

    @property
    def compiled_graphs(self) -> int:
        """How many step graphs have been compiled so far."""
        return len(self._steps)


class CompiledStep(CountedStep):
    """A step graph compiled by the inner backend, for every number of fresh tokens.

    Called with the model's inputs, the buffers of a generation and the chosen rows; returns the
    model's outputs.
    """

    def __init__(self, graph: StepGraph, source: fx.GraphModule, plan: Plan, inner: Inner) -> None:
        super().__init__(graph, source, plan)
        self._inner, self._compiling = inner, threading.Lock()
        self._of_inputs, self._of_tensors = picker(graph.kept), picker(graph.names)
        self._special: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._holds: dict[tuple[int, ...], bool] = {}
        # Symbols stand for sizes from 2 up; that the code made for them is right for 0 and 1 too
        # (some steps compute no token at all) is shown by tests/system/lower/test_inductor.py, not
        # by the compiler.
        self._run = self._compile(self._examples(self._symbol))
        self._conditions = [guard.expr for guard in self._shapes.guards]
        if self._conditions:
            log.warning(
                "%s asks for %s, %s; partial steps with other numbers are compiled one by one, and more than %d of them run uncompiled. "
                "`R: {multiple: ...}` in the policy makes them fewer",
                inner.backend,
                " and ".join(map(str, self._conditions)),
                ", ".join(
                    f"where {symbol} is the number of fresh tokens of {self._path(name)}"
                    for symbol, name in self._symbols.items()
                ),
                _MOST_SPECIAL,
            )

    def __call__(self, inputs: Sequence[Any], tensors: Mapping[str, Tensor]) -> Any:
        """Run the step; ``tensors`` are those of ``buffers``, of which the kept ones are written in
        place.
        """
        given = (*self._of_inputs(inputs), *self._of_tensors(tensors))
        run = self._run if not self._conditions else self._for_counts(tensors)
        return run(*given)

    def _for_counts(self, tensors: Mapping[str, Tensor]) -> Callable[..., Any]:
        """What runs a step with these numbers of fresh tokens, as the compiler's code holds for
        some only.
        """
        counts = {name: len(tensors[name]) for name in self._symbols.values()}
        key = tuple(counts.values())
        if key not in self._holds:
            self._holds[key] = self._hold_for(
                {symbol: counts[name] for symbol, name in self._symbols.items()}
            )
        if self._holds[key]:
            return self._run
        with self._compiling:
            if key not in self._special:
                if len(self._special) == _MOST_SPECIAL:
                    return self.graph.module
                self._special[key] = self._compile(self._examples(counts.__getitem__))
            return self._special[key]

    def _hold_for(self, numbers: Mapping[sympy.Expr, int]) -> bool:
        """Whether what the compiler asked for is so with these numbers."""
        try:
            return all(condition.subs(numbers) == True for condition in self._conditions)  # noqa: E712 - sympy's own truth
        except (ArithmeticError, TypeError):  # a remainder by 0
            return False

    def _compile(self, examples: list[Any]) -> Callable[..., Any]:
        # The compiler may rewrite what it is given; ours is still needed for counting FLOPs.
        module = fx.GraphModule(self.graph.module, copy.deepcopy(self.graph.module.graph))
        if self._inner.backend == "inductor":
            use_few_rows(module.graph, set().union(*self.graph.fresh_nodes.values()))
            module.recompile()
        with torch.no_grad():
            return compile_regions(module, examples, self._inner, self._mode)

    def _path(self, name: str) -> str:
        return f"`{self._plan.sites[buffers.site_of(name)].path}`"


def picker(keys: Sequence[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """What stands at ``keys`` in something, as a tuple."""
    if len(keys) > 1:
        return operator.itemgetter(*keys)
    return lambda values: tuple(values[key] for key in keys)
