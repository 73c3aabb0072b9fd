"""A model's step graphs, compiled when they are first needed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.lower.analysis import Analysis, Wanted
from toca_fx.lower.compiler import Inner
from toca_fx.lower.fake_inputs import FakeInputs, like
from toca_fx.lower.hoisted_values import HoistedValues
from toca_fx.lower.once import Recent, once
from toca_fx.lower.onload import is_offloaded, run_part
from toca_fx.lower.show import show
from toca_fx.lower.sizes import Shared
from toca_fx.lower.skeleton import Sized, Values
from toca_fx.lower.step import CompiledStep
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.plan import Plan, StepPlan, kind_of
from toca_fx.plan.schedule import Modes
from toca_fx.plan.step import StepSpec
from toca_fx.rewrite.step_graph import StepGraph
from toca_fx.torch_private import FakeTensorMode, ShapeEnv

log = logging.getLogger(__name__)

# The ones used last. A policy has a handful of kinds of step, and runs of other lengths share them.
_MOST_STEPS, _MOST_PLANS = 512, 64


class Program:
    """The compiled steps of an analysed model, and what is known of it.

    What was compiled for other sizes of it is in ``shared``; ``others`` are analyses for some.
    ``compiled_graphs`` is how many step graphs have been compiled so far; ``notes`` say why, where
    there was code for other sizes.
    """

    def __init__(
        self,
        analysis: Analysis,
        inner: Inner,
        shared: Shared | None = None,
        others: Iterable[Analysis] = (),
    ) -> None:
        self.analysis, self.inner = analysis, inner
        # Where nothing takes long to compile, nothing is shared.
        self._shared = shared if shared is not None and not inner.exact else Shared()
        self._others = others if not inner.exact else ()
        self._steps: Recent[StepSpec, CompiledStep] = Recent(_MOST_STEPS)
        # A specification takes long to hash. Plans are kept, so that no other gets their identity.
        self._of_plan: Recent[tuple[int, Modes], tuple[Plan, CompiledStep]] = Recent(_MOST_STEPS)
        self._kept: Recent[int, tuple[Plan, dict[Buffer, Tensor]]] = Recent(_MOST_PLANS)
        self._parts: dict[tuple[str, ...], Callable[..., Any]] = {}
        self.compiled_graphs = 0
        self.notes: dict[str, None] = {}
        matches = analysis.matches
        log.info("matched %d sites, %d near misses", len(matches.sites), len(matches.misses))
        show("captured", analysis.aten)

    def step(self, plan: Plan, modes: Modes) -> CompiledStep:
        """The compiled graph for steps in these modes; plans share it.

        It is built at the first call, which other threads wait for if they need it too.
        """
        return once(self._of_plan, (id(plan), modes), lambda: self._compiled(plan, modes))[1]

    def _compiled(self, plan: Plan, modes: Modes) -> tuple[Plan, CompiledStep]:
        spec = plan.step(modes, self.analysis.hoisted.names)
        if spec not in self._steps:
            graph = self.analysis.step_graph(plan, modes)
            show(f"step_{self.compiled_graphs}_{kind_of(modes, plan.whole)}", graph.module)
            before = self._shared.compiled
            made = self._steps[spec] = CompiledStep(
                graph,
                self.analysis.aten,
                plan,
                self.inner,
                self._shared,
                self.analysis.at_sizes,
                self._at_other_sizes(plan, modes),
                modes,
            )
            self.compiled_graphs += self._shared.compiled - before
            if made.reason:
                self.notes[
                    f"{kind_of(modes, plan.whole)} steps: compiled once more: {made.reason}"
                ] = None
        return plan, self._steps[spec]

    def _at_other_sizes(self, plan: Plan, modes: Modes) -> Iterator[Sized]:
        """The graph for steps in these modes as it is for other sizes."""
        for found in self._others:
            other = found.plan(len(plan.steps)) if plan.sites else found.uncached
            if [site.path for site in other.sites] == [site.path for site in plan.sites]:
                graph = found.step_graph(other, modes)
                yield FakeInputs(graph, found.aten, other).symbolic(found.at_sizes)

    def step_flops(self, plan: Plan, step: StepPlan) -> int:
        """FLOPs of one call that did ``step`` of a plan.

        Scoring is included, and hoisted work is not.
        """
        return self.step(plan, step.modes).cost.flops(step)

    def step_bytes(self, plan: Plan, step: StepPlan) -> int:
        """Bytes that one call that did ``step`` has to read or write: weights, inputs, caches."""
        return self.step(plan, step.modes).cost.nbytes(step)

    def new_buffers(self, plan: Plan) -> dict[Buffer, Tensor]:
        """The tensors that a generation of ``plan`` keeps."""
        _, like = once(self._kept, id(plan), lambda: (plan, self.analysis.kept(plan)))
        return {
            buffer: (torch.empty if buffer.written_first else torch.zeros)(
                value.shape, dtype=value.dtype, device=value.device
            )
            for buffer, value in like.items()
        }

    def new_hoisted(self, steps: int) -> HoistedValues:
        """Memory for the hoisted values of a generation at ``steps`` known timesteps."""
        return HoistedValues(self.analysis.hoisted, self.analysis.hoisted_examples, steps)

    def timed(self, wanted: Wanted) -> Callable[..., Any]:
        """The compiled part of the wanted timed values, for one timestep."""
        module = wanted.part.module
        if is_offloaded():  # compiled it would need all of its weights at once
            return functools.partial(run_part, module)
        return once(
            self._parts,
            wanted.names,
            lambda: self._compiled_part(
                wanted.names, module, lambda found: found.wanted_part(wanted)
            ),
        )

    def first_block(self, inputs: Sequence[Any]) -> Tensor:
        """What the first block adds to the residual stream, for a call with these inputs."""
        part, names = self.analysis.first_block, self.analysis.matches.first_block
        given = [inputs[at] for at in part.kept]
        if is_offloaded():
            before, behind = run_part(part.module, *given)
        else:
            run = once(
                self._parts,
                names,
                lambda: self._compiled_part(names, part.module, lambda found: found.first_block),
            )
            before, behind = run(*given)
        added: Tensor = behind - before
        return added

    def _compiled_part(
        self, names: Sequence[str], part: fx.GraphModule, of: Callable[[Analysis], StepGraph]
    ) -> Callable[..., Any]:
        """A part, which computes the nodes ``names``; ``of`` gives that of another analysis."""

        def sized(module: fx.GraphModule, sizes: Values) -> Sized:
            mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
            placeholders = module.graph.find_nodes(op="placeholder")
            inputs = [like(mode, node.meta["val"]) for node in placeholders]
            return Sized(module, inputs, sizes, mode)

        others = (sized(of(found).module, found.at_sizes) for found in self._others)

        def compiled(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            with torch.no_grad():
                return self.inner(module, inputs)

        found = sized(part, self.analysis.at_sizes)
        return self._shared.fitted(names, found, compiled, others).run
