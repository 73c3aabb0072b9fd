"""The ``toca`` backend of torch.compile, and ``toca_fx.compile``, which wraps it."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from toca_fx.capture.aten import to_aten, verify
from toca_fx.capture.calls import current_call
from toca_fx.capture.identity import identity
from toca_fx.capture.numbers import Numbers
from toca_fx.capture.offload import Offloaded
from toca_fx.capture.recent import is_first, keep_recent
from toca_fx.capture.scalars import Scalars
from toca_fx.capture.sources import (
    captured_code,
    captured_model,
    frame_id,
    input_sources,
    model_class,
)
from toca_fx.capture.subclasses import Unwrapping, as_plain, refuse_opaque, unwrapped
from toca_fx.capture.twin import twin_of
from toca_fx.capture.updates import Updates
from toca_fx.diagnostics import UnsupportedModelError, did_you_mean
from toca_fx.graph import roles
from toca_fx.graph.autocast import OFF
from toca_fx.lower.analysis import Analysis
from toca_fx.lower.compiler import Compiler, Inner
from toca_fx.lower.locks import let_go
from toca_fx.lower.once import Recent, once
from toca_fx.lower.onload import as_stubs, onloaded, onloading
from toca_fx.lower.program import Program
from toca_fx.lower.step import picker
from toca_fx.match.matcher import match
from toca_fx.pipelines.twin import original_pipeline, pipeline_twin, transformers_of
from toca_fx.plan.choose import default_policy, written_for_another
from toca_fx.plan.planner import Planner
from toca_fx.plan.units import whole_model
from toca_fx.policy import Policy, PolicySource, load_policy
from toca_fx.runtime import words
from toca_fx.runtime.context import current_place
from toca_fx.runtime.identity import fingerprint
from toca_fx.runtime.models import models_of
from toca_fx.runtime.parts import Attempt, attempt_of
from toca_fx.runtime.runner import Runner
from toca_fx.runtime.told import METHODS, refuse_two_caches

log = logging.getLogger(__name__)

_MANY_SHAPES = 8
_MOST_GRAPHS = 32  # of one model
_MOST_SHAPES = 64  # programs of one graph; the one that was called least recently goes

Model = TypeVar("Model")


def compile(  # noqa: A001 - as torch.compile
    model: Model,
    policy: PolicySource | Mapping[str, PolicySource | None] | None = None,
    *,
    inner: Compiler = "inductor",
    mode: str | None = None,
) -> Model:
    """A twin of ``model`` that computes only the tokens that matter on most denoising steps.

    ``model`` is a denoising transformer (any ``torch.nn.Module``) or a diffusers pipeline with a
    ``transformer``. The twin is a view of it, and an instance of its class: what is set on one
    (adapters, hooks, a submodule, ``training``) is set on the other, and calling ``model`` itself
    runs what it ran before. Copies and pickles of a module's twin are the model's.

    A pipeline's twin has twins as its ``transformer`` and ``transformer_2``. Each call of it asks
    the scheduler for the steps of a run, gives the memories back when it ends, and leaves a report:
    ``toca_fx.last_report(pipe)``. Copies and pickles of it are compiled too. A model that is a twin
    already keeps its own policy.

    ``policy`` is a shipped name ("dit-xl-2"), a path, a mapping or a ``Policy``; None picks the
    shipped policy that names the model's class, else ``default-image`` or ``default-video``. Of a
    pipeline it may be one of these for each model, ``{"transformer": ..., "transformer_2": ...}``.
    ``inner`` compiles the rewritten graphs: "inductor", "aot_eager", "eager" or any other
    torch.compile backend; ``mode`` is inductor's, as in torch.compile ("reduce-overhead": CUDA
    graphs).

    Raises:
        PolicyError: the policy has problems (all are listed).
        ValueError, TypeError: an unknown ``inner`` or ``mode``, a ``model`` of another kind, or one
            with a cache of diffusers (``enable_cache``).
        UnsupportedModelError: a parameter is a tensor of a class that cannot be followed.
    """
    with_mode = Inner(inner, mode)
    if isinstance(model, nn.Module):
        given = None if policy is None else load_policy(policy)
        return cast("Model", _compile_module(model, given, with_mode))
    pipe = original_pipeline(model)
    models = transformers_of(pipe)
    if not models:
        unet = "; it denoises with a U-Net" if hasattr(pipe, "unet") else ""
        raise TypeError(
            "expected a torch.nn.Module or a diffusers pipeline with a transformer, got "
            f"{type(model).__name__}{unet}"
        )
    policies = _policies(policy, tuple(models))

    def compile_model(module: nn.Module, name: str, methods: Mapping[str, Any]) -> nn.Module:
        own = getattr(module, "_toca_backend", None)  # it was compiled by itself
        if own is not None:
            return cast("nn.Module", _compile_module(module, own.policy, own.inner, methods))
        return cast("nn.Module", _compile_module(module, policies.get(name), with_mode, methods))

    again = functools.partial(compile, policy=policy, inner=inner, mode=mode)
    return cast("Model", pipeline_twin(pipe, compile_model, again))


def _compile_module(
    model: nn.Module, policy: Policy | None, inner: Inner, methods: Mapping[str, Any] | None = None
) -> Any:
    """A twin of a module, with some methods more."""
    refuse_two_caches(model)
    refuse_opaque(model)
    backend = Backend(policy, inner, "whole")
    parts = replace(backend, capture="parts")
    return twin_of(model, backend, parts, {**METHODS, **(methods or {})}, backend.around)


def _policies(policy: Any, models: Sequence[str]) -> dict[str, Policy | None]:
    """The policy of each of the ``models`` of a pipeline: one for all, or one for each."""
    if isinstance(policy, Mapping) and any(name in models for name in policy):
        for unknown in policy:
            if unknown not in models:
                hint = did_you_mean(unknown, models)
                raise ValueError(
                    f"compile(policy={{{unknown!r}: ...}}): the pipeline has no model of this "
                    f"name{hint}; it has {', '.join(models)}"
                )
        return {name: None if each is None else load_policy(each) for name, each in policy.items()}
    return dict.fromkeys(models, None if policy is None else load_policy(policy))


def toca(
    captured: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Any:
    """The backend "toca" of torch.compile.

    ``torch.compile(model, backend="toca", options={"policy": ..., "inner": ..., "mode": ...})``,
    where every option may be left out. torch.compile takes either ``options`` or ``mode``, so that
    the mode may be given in both ways.

    Raises:
        PolicyError: the policy has problems (all are listed).
        ValueError, TypeError: an unknown option, ``inner`` or ``mode``.
    """
    options = dict(options or {})
    policy, inner = options.pop("policy", None), options.pop("inner", "inductor")
    mode = options.pop("mode", mode)
    for unknown in options:
        hint = did_you_mean(unknown, ("policy", "inner", "mode"))
        raise ValueError(f"backend toca: unknown option `{unknown}`{hint}")
    backend = Backend(None if policy is None else load_policy(policy), Inner(inner, mode))
    return backend(captured, inputs)


@dataclass(frozen=True)
class Backend:
    """A torch.compile backend with its options; a ``policy`` of None is chosen by the model.

    ``capture`` says that models are captured as one graph ("whole"), or in several ("parts"), of
    which those without sites are run as they are; or that Dynamo decides.

    Frozen, because Dynamo guards on backends being equal.
    """

    policy: Policy | None
    inner: Inner
    capture: Literal["whole", "parts", "any"] = "any"

    def __call__(self, captured: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Compile Dynamo's graph for its first inputs; returns the callable that replaces it."""
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        ):
            log.warning(
                "toca_fx: gradients are enabled: the model runs uncached, because cached features "
                "have no gradient. Sample under torch.no_grad() or torch.inference_mode()"
            )
            run = self.inner(captured, list(inputs))
            return lambda *given: run(*onloaded(given))
        if not inputs:  # a part of a model that is given nothing
            return self.inner(captured, [])
        refuse_two_caches(captured_model())
        input_sources(captured)  # Dynamo forgets them afterwards
        plain, unwrapping = unwrapped(captured, inputs)
        made = Dispatcher(plain, self, model_class(), inputs, unwrapping)
        same = identity(plain, unwrapping(inputs))
        found = made if same is None else _dispatchers.setdefault((self, same), made)
        _keep(captured_model(), captured_code(), found)
        return found

    def reset(self) -> None:
        """Keep nothing: Dynamo calls it where it forgets all that it has captured."""
        _of_model.clear()

    def around(self, model: nn.Module, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The ``compiled`` call of ``model``, with hooks that offload or cast outside of it."""
        return Offloaded(
            model,
            compiled,
            onloading=onloading,
            fingerprint=fingerprint,
            records=self.inner.records is True,
        )


class Dispatcher:
    """The callable that Dynamo runs instead of the model: it hands each call to the session.

    ``captured`` takes what ``unwrapping`` makes of the inputs of a call. If the ``backend`` has no
    policy it is chosen by ``model_class``, or by the inputs.
    """

    def __init__(
        self,
        captured: fx.GraphModule,
        backend: Backend,
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
        self._scalars = Scalars(captured)
        self._captured = captured = self._scalars.graph
        self._inner, self._capture = backend.inner, backend.capture
        self._given, self._model_class = backend.policy, model_class
        self._chosen: Policy | None = None
        self._numbers = Numbers(captured)
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
        self._models = models_of((frame_id() if state else id(self), backend.policy))
        # Dynamo guards all inputs but the numbers that it made symbolic. Symbolic numbers without
        # users are storage offsets of views.
        self._varying = [
            at
            for at, node in enumerate(captured.graph.find_nodes(op="placeholder"))
            if at not in state and (isinstance(inputs[at], Tensor) or node.users)
        ]
        self._runners: Recent[object, tuple[Runner | None, Updates]] = Recent(_MOST_SHAPES)
        self.captured_anew: CodeType | None = None  # since the last call

    def __call__(self, *inputs: Any) -> Any:
        """Run the model's next step on the flat inputs of Dynamo's graph.

        If it raises, wherever that is, the call was not made.
        """
        code, self.captured_anew = self.captured_anew, None
        if code is not None:
            keep_recent(code, lambda backend: isinstance(backend, Backend))
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
        runner, updates = once(self._runners, key, lambda: self._prepared(inputs))
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

    def _prepared(self, inputs: Sequence[Any]) -> tuple[Runner | None, Updates]:
        """The same as ``_prepare``; no runner for one of several parts that cannot be followed.

        It may write to what an earlier part has made.
        """
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
        if len(self._runners) == _MANY_SHAPES - 1:
            log.warning(
                "toca_fx: the model has been compiled for %d different shapes or numbers; a Python "
                "number that changes from step to step (a timestep?) has to be passed as a tensor, "
                "or nothing is ever cached",
                _MANY_SHAPES,
            )
        given = onloaded(inputs, self._numbers.reads)
        aten = to_aten(self._captured, given, self._numbers)
        if aten.meta["writes"]:
            verify(self._captured, aten, onloaded(inputs))
        matches = match(aten.graph)
        policy = self._choose(aten.graph)
        if self._capture == "parts" and policy.gate is not None:
            if matches.sites:
                log.warning("toca_fx: %s", words.NO_GATE)
            policy = policy.always_full()
        if not matches.sites and self._capture == "parts":
            # What lies ahead of the blocks, or behind them.
            policy = policy.without_memories()
            roles.trust_names(aten.graph, input_sources(self._captured))
        elif matches.is_block and not roles.positions(aten.graph, "timestep"):
            policy = policy.without_memories()
            log.warning("toca_fx: %s", words.BLOCK_ALONE)
        elif not matches.sites and not whole_model(policy, matches):
            log.warning("toca_fx: %s", words.nothing_to_cache(len(matches.misses)))
        planner = Planner(policy, matches, roles.aspect(aten.graph))
        updates = aten.meta["updates"]
        program = Program(Analysis(aten, planner), self._inner)
        return Runner(program, inputs, updates.positions), updates

    def _choose(self, graph: fx.Graph) -> Policy:
        """The policy that was given, or the one that suits the model; for all shapes."""
        if self._chosen is None:
            latents = roles.latents_shape(graph)
            rank = None if latents is None else len(latents)
            self._chosen = self._given or default_policy(self._model_class, rank)
            if warning := written_for_another(self._chosen, self._model_class):
                log.warning("toca_fx: %s", warning)
        return self._chosen


# Those that somebody still holds: a generation stays with the runner that it began with, and with
# its memories, whichever thread's capture Dynamo takes for its next step.
_dispatchers: MutableMapping[object, Dispatcher] = weakref.WeakValueDictionary()

# Dynamo holds those of the captures that it keeps, and a model its own, for a graph that comes
# again: an adapter that is loaded once more, by another name.
_of_model: MutableMapping[nn.Module, Recent[int, Dispatcher]] = weakref.WeakKeyDictionary()


def _keep(model: nn.Module | None, code: CodeType | None, found: Dispatcher) -> None:
    """Keep what was captured from a ``model``, and let the least recently captured ones go."""
    found.captured_anew = code
    if model is None or code is None:
        return
    if is_first(code):  # it is the first one, or Dynamo was reset
        _of_model.pop(model, None)
    kept = _of_model.setdefault(model, Recent(_MOST_GRAPHS))
    kept.pop(id(found), None)
    kept[id(found)] = found
