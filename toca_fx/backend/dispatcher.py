"""What Dynamo runs instead of a model: its graph, analysed for the sizes of each call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

from torch import Tensor, fx, nn

from toca_fx.capture.aten import chooses_kernels, to_aten, to_aten_at, verify
from toca_fx.capture.calls import current_call
from toca_fx.capture.numbers import Numbers
from toca_fx.capture.recent import keep_recent
from toca_fx.capture.scalars import Scalars
from toca_fx.capture.sizes import Sizes
from toca_fx.capture.sources import (
    frame_id,
    input_sources,
    is_of_shape,
)
from toca_fx.capture.subclasses import Unwrapping, as_plain, as_themselves
from toca_fx.capture.updates import Updates
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.graph import roles
from toca_fx.graph.autocast import OFF, Autocast
from toca_fx.lower.analysis import Analysis
from toca_fx.lower.compiler import Inner
from toca_fx.lower.locks import let_go
from toca_fx.lower.once import Recent, Replayed, once
from toca_fx.lower.onload import as_stubs, onloaded
from toca_fx.lower.program import Program
from toca_fx.lower.sizes import Shared
from toca_fx.lower.step import picker
from toca_fx.match.matcher import match
from toca_fx.plan.choose import default_policy, written_for_another
from toca_fx.plan.planner import Planner
from toca_fx.plan.units import whole_model
from toca_fx.policy import Policy
from toca_fx.runtime import words
from toca_fx.runtime.context import current_place
from toca_fx.runtime.models import models_of
from toca_fx.runtime.parts import Attempt, attempt_of
from toca_fx.runtime.runner import Runner

log = logging.getLogger(__name__)

_MANY_NUMBERS = 8
_MOST_SHAPES = 32  # programs of one graph; the one that was called least recently goes


@dataclass(frozen=True)
class Options:
    """What a model is compiled with; a ``policy`` of None is chosen by the model.

    ``capture`` says that models are captured as one graph ("whole"), or in several ("parts"), of
    which those without sites are run as they are; or that Dynamo decides. ``dynamic`` is as in
    torch.compile.

    Frozen, because Dynamo guards on backends being equal.
    """

    policy: Policy | None
    inner: Inner
    capture: Literal["whole", "parts", "any"] = "any"
    dynamic: bool | None = None


class Dispatcher:
    """The callable that Dynamo runs instead of the model: it hands each call to the session.

    ``captured`` takes what ``unwrapping`` makes of the inputs of a call. If the ``options`` have no
    policy it is chosen by ``model_class``, or by the inputs.
    """

    def __init__(
        self,
        captured: fx.GraphModule,
        options: Options,
        model_class: str,
        inputs: Sequence[Any],
        unwrapping: Unwrapping,
    ) -> None:
        self._unwrapping = unwrapping
        outer, inputs = inputs, unwrapping(inputs)
        parameters = {
            id(value)
            for value, at in zip(inputs, unwrapping.outer, strict=True)
            if isinstance(outer[at], nn.Parameter)
        }
        if chooses_kernels(captured):
            log.warning("toca_fx: %s", words.KERNELS)
        self._scalars = Scalars(captured)
        self._captured = captured = self._scalars.graph
        self._inner, self._capture = options.inner, options.capture
        self._given, self._model_class = options.policy, model_class
        self._chosen: Policy | None = None
        self._numbers, self._sizes = Numbers(captured), Sizes(captured)
        self._shared = Shared(self._sizes.expressions, self._sizes.names)
        sources = input_sources(captured)
        inputs = self._scalars.examples(inputs)
        model = roles.model_name(sources)
        state = [at for at, value in enumerate(inputs) if roles.is_state(sources[at], value, model)]
        # What makes a model the one it is: its weights, as graphs for other shapes read other
        # buffers; or its buffers, where all weights are quantised.
        weights = [at for at in state if id(inputs[at]) in parameters]
        self._weights = picker(weights or [at for at in state if isinstance(inputs[at], Tensor)])
        # The frame keeps the parts of a broken graph apart. A graph that holds its weights is of
        # one model only.
        self._models = models_of((frame_id() if state else id(self), options.policy))
        # Dynamo guards all inputs but the numbers that it made symbolic. Symbolic numbers without
        # users are storage offsets of views.
        self._varying = [
            at
            for at, node in enumerate(captured.graph.find_nodes(op="placeholder"))
            if at not in state and (isinstance(inputs[at], Tensor) or node.users)
        ]
        # Those among them that are no size of a tensor, and all that they were so far.
        self._plain = [
            at
            for at in self._varying
            if not isinstance(inputs[at], Tensor) and not is_of_shape(sources[at])
        ]
        self._told: set[Hashable] = set()
        self._runners: Recent[object, tuple[Runner | None, Updates]] = Recent(_MOST_SHAPES)
        self.captured_anew: CodeType | None = None  # since the last call

    def __call__(self, *inputs: Any) -> Any:
        """Run the model's next step on the flat inputs of Dynamo's graph.

        If it raises, wherever that is, the call was not made.
        """
        code, self.captured_anew = self.captured_anew, None
        if code is not None:
            keep_recent(code, lambda backend: isinstance(backend, Options))
        expected = self._capture == "parts"
        whole = self._capture == "whole"
        within = current_call.get()
        attempt = Attempt() if whole else attempt_of(self, 1, expected=expected, within=within)
        try:
            given, numbers = self._scalars.given(self._unwrapping(as_stubs(inputs)))
            return self._scalars.returned(self._run(given, attempt), numbers)
        except BaseException:
            let_go()
            attempt.undo()
            raise

    def _run(self, inputs: Sequence[Any], attempt: Attempt) -> Any:
        values = (inputs[at] for at in self._varying)
        shapes = tuple(
            (value.shape, value.stride()) if isinstance(value, Tensor) else value
            for value in values
        )
        # What the model reads out of tensors is part of its graph.
        key = (shapes, self._numbers.read(onloaded(inputs, self._numbers.reads)))
        runner, updates = once(self._runners, key, lambda: self._prepared(inputs, key[1]))
        if runner is None:
            return self._captured(*onloaded(inputs))
        model = self._models.key(self._weights(inputs))
        # Casts are in the graphs, and so is what tensors of classes of their own make of calls.
        with OFF.again(), as_plain():
            begun = attempt.session()
            if begun is None:
                at = current_place()
                output = at.session.call(model, runner, inputs, attempt, at.path, at.told)
            else:
                output = begun.follow(attempt, model, runner, inputs)
            updates.apply(onloaded(inputs, updates.reads))
        return output

    def _prepared(self, inputs: Sequence[Any], numbers: Hashable) -> tuple[Runner | None, Updates]:
        """The same as ``_prepare``; no runner for one of several parts that cannot be followed.

        It may write to what an earlier part has made.
        """
        self._note(tuple(inputs[at] for at in self._plain), numbers)
        try:
            return self._prepare(inputs)
        except UnsupportedModelError as error:
            if self._capture != "parts":
                raise
            modules = any(node.meta.get("nn_module_stack") for node in self._captured.graph.nodes)
            # Of masks and indices nothing would be cached.
            log.log(
                logging.WARNING if modules else logging.DEBUG,
                "toca_fx: of several graphs of the model one runs as it is, at every step: %s",
                error,
            )
            return None, Updates()

    def _prepare(self, inputs: Sequence[Any]) -> tuple[Runner, Updates]:
        """Analyse Dynamo's graph for the shapes of ``inputs``; nothing is compiled yet."""
        given = onloaded(inputs, self._numbers.reads)
        aten = to_aten(self._captured, given, self._numbers, self._sizes)
        if aten.meta["writes"]:
            verify(self._captured, aten, onloaded(inputs))
        analysis = self._analysed(aten, lambda word: log.warning("toca_fx: %s", word))
        others = Replayed(self._at_other_sizes(aten, Autocast.now()))
        program = Program(analysis, self._inner, self._shared, others)
        updates = aten.meta["updates"]
        return Runner(program, inputs, updates.positions), updates

    def _note(self, *numbers: Hashable) -> None:
        """Warn of numbers that are others at every call."""
        if len(self._told) == _MANY_NUMBERS or numbers in self._told:
            return
        self._told.add(numbers)
        if len(self._told) == _MANY_NUMBERS:
            log.warning(
                "toca_fx: the model has been compiled for %d different numbers; a Python number "
                "that changes from step to step (a timestep?) has to be passed as a tensor, or "
                "nothing is ever cached",
                _MANY_NUMBERS,
            )

    def _at_other_sizes(self, aten: fx.GraphModule, state: Autocast) -> Iterator[Analysis]:
        """Analyses for other sizes than those that ``aten`` is for, in the same state of autocast.

        Numbers that differ between the graphs follow from the sizes.
        """
        for sizes in self._sizes.others(aten.meta["sizes"]):
            try:
                with state.again(), as_themselves():  # some step may ask for them
                    found = to_aten_at(self._captured, aten, self._numbers, self._sizes, sizes)
            except Exception as error:  # of operators, which say in many ways what they refuse
                log.debug("toca_fx: sizes %s cannot be tried: %s", sizes, error)
                continue
            yield self._analysed(found)

    def _analysed(
        self, aten: fx.GraphModule, warn: Callable[[str], None] = lambda _: None
    ) -> Analysis:
        matches = match(aten.graph)
        policy = self._choose(aten.graph)
        if self._capture == "parts" and policy.gate is not None:
            if matches.sites:
                warn(words.NO_GATE)
            policy = policy.always_full()
        if not matches.sites and self._capture == "parts":
            # What lies ahead of the blocks, or behind them.
            policy = policy.without_memories()
            roles.trust_names(aten.graph, input_sources(self._captured))
        elif matches.is_block and not roles.positions(aten.graph, "timestep"):
            policy = policy.without_memories()
            warn(words.BLOCK_ALONE)
        elif not matches.sites and not whole_model(policy, matches):
            warn(words.nothing_to_cache(len(matches.misses)))
        return Analysis(aten, Planner(policy, matches, roles.aspect(aten.graph)))

    def _choose(self, graph: fx.Graph) -> Policy:
        """The policy that was given, or the one that suits the model; for all shapes."""
        if self._chosen is None:
            latents = roles.latents_shape(graph)
            rank = None if latents is None else len(latents)
            self._chosen = self._given or default_policy(self._model_class, rank)
            if warning := written_for_another(self._chosen, self._model_class):
                log.warning("toca_fx: %s", warning)
        return self._chosen
