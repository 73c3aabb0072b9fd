"""The ``toca`` backend of torch.compile, and ``toca_fx.compile``, which wraps it."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._guards import CompileContext
from torch.utils.weak import WeakIdKeyDictionary

from toca_fx.capture import aten as trace
from toca_fx.diagnostics import did_you_mean
from toca_fx.lower.compiler import Compiler, Inner
from toca_fx.lower.program import Program, picker
from toca_fx.policy import Policy, PolicySource, load_policy, shipped_policies
from toca_fx.runtime.session import ModelKey, current_session

log = logging.getLogger(__name__)

_MANY_PROGRAMS = 8

Model = TypeVar("Model")


def compile(  # noqa: A001 - as torch.compile
    model: Model,
    policy: PolicySource | None = None,
    *,
    inner: Compiler = "inductor",
    mode: str | None = None,
) -> Model:
    """A twin of ``model`` that computes only the tokens that matter on most denoising steps.

    ``model`` is a denoising transformer (any ``torch.nn.Module``) or a diffusers pipeline with a
    ``transformer``. The twin shares all parameters and attributes with it and has its class;
    ``model`` itself stays as it is. ``policy`` is a shipped name ("dit-xl-2"), a path, a mapping or
    a ``Policy``; None picks the shipped policy that names the model's class, else ``default-image``
    or ``default-video``. ``inner`` compiles the rewritten graphs: "inductor", "aot_eager", "eager"
    or any other torch.compile backend; ``mode`` is inductor's, as in torch.compile
    ("reduce-overhead": CUDA graphs).

    Raises:
        PolicyError: the policy has problems (all are listed).
        ValueError, TypeError: an unknown ``inner`` or ``mode``, or a ``model`` of another kind.
    """
    backend = Backend(None if policy is None else load_policy(policy), Inner(inner, mode))
    transformer = getattr(model, "transformer", None)
    if not isinstance(model, nn.Module) and isinstance(transformer, nn.Module):
        if isinstance(getattr(model, "transformer_2", None), nn.Module):
            log.warning(
                "only `transformer` of the pipeline is compiled; compile `transformer_2` too, with a policy for the steps that it runs"
            )
        twin = copy.copy(model)
        twin.transformer = compile(transformer, backend.policy, inner=inner, mode=mode)  # type: ignore[attr-defined]
        return twin
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module or a diffusers pipeline with a transformer, got {type(model).__name__}"
        )
    module = copy.copy(getattr(model, "_orig_mod", model))
    module.compile(backend=backend, fullgraph=True)
    return module


def toca(
    captured: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Any:
    """``torch.compile(model, backend="toca", options={"policy": ..., "inner": ..., "mode": ...})``;
    all may be left out.

    torch.compile takes either ``options`` or ``mode``, so that the mode may be given in both ways.
    """
    options = dict(options or {})
    policy, inner, mode = (
        options.pop("policy", None),
        options.pop("inner", "inductor"),
        options.pop("mode", mode),
    )
    if options:
        unknown = next(iter(options))
        raise ValueError(
            f"backend toca: unknown option `{unknown}`{did_you_mean(unknown, ('policy', 'inner', 'mode'))}"
        )
    return Backend(None if policy is None else load_policy(policy), Inner(inner, mode))(
        captured, inputs
    )


@dataclass(frozen=True)
class Backend:
    """A torch.compile backend. Frozen, because Dynamo guards on backends being equal. ``policy``
    None: pick by model.
    """

    policy: Policy | None
    inner: Inner

    def __call__(self, captured: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Take Dynamo's graph and its first inputs; return what runs in their place."""
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        ):
            log.warning(
                "gradients are enabled: the model runs uncached, because cached features have no gradient. "
                "Sample under torch.no_grad() or torch.inference_mode()"
            )
            return self.inner(captured, list(inputs))
        model_class = trace.model_class()
        policy = self.policy or default_policy(model_class, call_inputs(captured, inputs))
        if warning := written_for_another(policy, model_class):
            log.warning("%s", warning)
        return Dispatcher(captured, policy, self.inner, inputs)


class Dispatcher:
    """What Dynamo calls in the model's place: hands each call to the session, which knows the
    step.
    """

    def __init__(
        self, captured: fx.GraphModule, policy: Policy, inner: Inner, inputs: Sequence[Any]
    ) -> None:
        self._captured, self._policy, self._inner = captured, policy, inner
        self._timestep = trace.timestep_position(trace.input_sources(captured), inputs)
        compile_id = CompileContext.current_compile_id()
        # The place in the code keeps the parts of a broken graph apart; it stays the same across
        # recompilations.
        self._place = (None if compile_id is None else compile_id.frame_id, policy)
        self._parameters = picker(
            [at for at, value in enumerate(inputs) if isinstance(value, nn.Parameter)]
        )
        # Dynamo guards all but the numbers that it made symbolic. Those unused are storage offsets
        # of views.
        nodes = captured.graph.find_nodes(op="placeholder")
        self._varying = [
            at
            for at, value in enumerate(inputs)
            if (
                nodes[at].users
                if not isinstance(value, Tensor)
                else not isinstance(value, nn.Parameter)
            )
        ]
        self._programs: dict[tuple[object, ...], Program] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        """Run the model's next step on the flat inputs of Dynamo's graph."""
        values = (inputs[at] for at in self._varying)
        shapes = tuple(
            (value.shape, value.stride()) if isinstance(value, Tensor) else value
            for value in values
        )
        with self._lock:
            program = self._programs.get(shapes)
            if program is None:
                program = self._programs[shapes] = Program(
                    self._captured, inputs, self._policy, self._inner
                )
                if len(self._programs) == _MANY_PROGRAMS:
                    log.warning(
                        "the model has been compiled for %d different shapes or numbers; a Python number that changes from "
                        "step to step (a timestep?) has to be passed as a tensor, or nothing is ever cached",
                        _MANY_PROGRAMS,
                    )
        return current_session().call(self._model_key(inputs), program, inputs, self._timestep)

    def _model_key(self, inputs: Sequence[Any]) -> ModelKey:
        """Dynamo shares code between models of one class, so which model it is shows at the call
        only.
        """
        parameters = self._parameters(inputs)
        owner = parameters[0] if parameters else _no_parameters
        if owner not in _model_keys:
            _model_keys[owner] = {}
        # Models may share some parameters, an embedder say.
        return _model_keys[owner].setdefault((self._place, tuple(map(id, parameters))), ModelKey())


def default_policy(model_class: str, inputs: Sequence[Any]) -> Policy:
    """The policy for a model that none was given for; logs which.

    It is TOCA_POLICY if set, else the shipped policy that names ``model_class``, else
    ``default-video`` if the latents among ``inputs`` (those of the call, without parameters) have
    five axes, else ``default-image``.
    """
    if chosen := os.environ.get("TOCA_POLICY"):
        log.info("policy `%s` (from TOCA_POLICY)", chosen)
        return load_policy(chosen)
    for name in sorted(shipped_policies()):
        policy = load_policy(name)
        if not name.startswith("reference/") and model_class in policy.model:
            log.info("policy `%s` (it names %s)", name, model_class)
            return policy
    ranks = [
        value.dim()
        for value in inputs
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 4
    ]
    name = "default-video" if ranks[:1] == [5] else "default-image"
    log.info("policy `%s` (none names %s)", name, model_class or "the model")
    return load_policy(name)


def written_for_another(policy: Policy, model_class: str) -> str | None:
    """The warning that a policy is for other models than this one, if it is."""
    if not policy.model or not model_class or model_class in policy.model:
        return None
    return f"policy `{policy.name}` was written for {', '.join(policy.model)}; the model is a {model_class}"


def call_inputs(captured: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Those of the ``inputs`` of Dynamo's graph that the model was called with: no parameters, no
    buffers.
    """
    sources = trace.input_sources(captured)
    return [
        value
        for source, value in zip(sources, inputs, strict=True)
        if not trace.is_model_state(source) and not isinstance(value, nn.Parameter)
    ]


# By a model's first parameter: keys go when the model goes. Parameters compare by identity here,
# not by value.
_model_keys: MutableMapping[Tensor, dict[object, ModelKey]] = WeakIdKeyDictionary()
_no_parameters = torch.empty(0)
