"""The ``toca`` backend of torch.compile, and ``toca_fx.compile``, which wraps it."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from types import CodeType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from toca_fx.backend.dispatcher import Dispatcher, Options
from toca_fx.capture.identity import identity
from toca_fx.capture.offload import Offloaded
from toca_fx.capture.recent import is_first
from toca_fx.capture.sources import (
    captured_code,
    captured_model,
    input_sources,
    model_class,
)
from toca_fx.capture.subclasses import refuse_opaque, unwrapped
from toca_fx.capture.twin import twin_of
from toca_fx.diagnostics import did_you_mean
from toca_fx.lower.compiler import Compiler, Inner
from toca_fx.lower.once import Recent
from toca_fx.lower.onload import onloaded, onloading
from toca_fx.pipelines.twin import original_pipeline, pipeline_twin, transformers_of
from toca_fx.policy import Policy, PolicySource, load_policy
from toca_fx.runtime.identity import fingerprint
from toca_fx.runtime.told import METHODS, refuse_two_caches

log = logging.getLogger(__name__)

_MOST_GRAPHS = 32  # of one model

Model = TypeVar("Model")


def compile(  # noqa: A001 - as torch.compile
    model: Model,
    policy: PolicySource | Mapping[str, PolicySource | None] | None = None,
    *,
    inner: Compiler = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
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
    graphs), and so is ``dynamic``: sizes are symbolic from the second one on (None), from the first
    (True) or never (False).

    Raises:
        PolicyError: the policy has problems (all are listed).
        ValueError, TypeError: an unknown ``inner`` or ``mode``, a ``model`` of another kind, or one
            with a cache of diffusers (``enable_cache``).
        UnsupportedModelError: a parameter is a tensor of a class that cannot be followed.
    """
    with_mode = Inner(inner, mode)
    if isinstance(model, nn.Module):
        given = None if policy is None else load_policy(policy)
        return cast("Model", _compile_module(model, given, with_mode, dynamic))
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
            return cast(
                "nn.Module", _compile_module(module, own.policy, own.inner, own.dynamic, methods)
            )
        return cast(
            "nn.Module", _compile_module(module, policies.get(name), with_mode, dynamic, methods)
        )

    again = functools.partial(compile, policy=policy, inner=inner, mode=mode, dynamic=dynamic)
    return cast("Model", pipeline_twin(pipe, compile_model, again))


def _compile_module(
    model: nn.Module,
    policy: Policy | None,
    inner: Inner,
    dynamic: bool | None,
    methods: Mapping[str, Any] | None = None,
) -> Any:
    """A twin of a module, with some methods more."""
    refuse_two_caches(model)
    refuse_opaque(model)
    backend = Backend(policy, inner, "whole", dynamic)
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


class Backend(Options):
    """A torch.compile backend with its options."""

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
