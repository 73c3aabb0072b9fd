"""A view of a pipeline whose models run compiled, and that is that pipeline in everything else."""

from __future__ import annotations

import copy
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import nn

from toca_fx.pipelines.call import Call
from toca_fx.runtime.context import current_session
from toca_fx.runtime.report import Report
from toca_fx.runtime.told import refuse_two_caches

log = logging.getLogger(__name__)

Pipeline = TypeVar("Pipeline")

_MAKERS = ("from_pipe", "from_pretrained", "from_single_file")

Compile = Callable[[nn.Module, str, Mapping[str, Any]], nn.Module]
"""Compiles a model, a component by that name, into a twin with some methods."""

# The calls of pipelines that are under way, from the outside in.
_under_way: ContextVar[tuple[tuple[State, Call], ...]] = ContextVar("toca_fx_calls", default=())


class State:
    """What a compiled pipeline has of its own, beside the ``pipeline`` that it is a view of.

    ``compile_model`` makes the twins of its models, ``again`` compiles a copy of it alike.
    """

    def __init__(self, pipeline: Any, compile_model: Compile, again: Callable[[Any], Any]) -> None:
        self.pipeline, self.again = pipeline, again
        self._compile = compile_model
        self._twins: dict[str, tuple[nn.Module, nn.Module]] = {}
        self._last = threading.local()

    def component(self, name: str) -> Any:
        """The twin of the model that the pipeline has by that name now; else what it has."""
        model = vars(self.pipeline)[name]
        if not isinstance(model, nn.Module):
            return model
        known = self._twins.get(name)
        if known is None or known[0] is not model:
            state = weakref.ref(self)

            def call(twin: Any, *args: Any, **kwargs: Any) -> Any:
                with _of_model(state(), name):
                    return super(type(twin), twin).__call__(*args, **kwargs)  # type: ignore[misc]

            known = self._twins[name] = model, self._compile(model, name, {"__call__": call})
        return known[1]

    def replace(self, name: str, model: Any) -> None:
        """Give the pipeline another model by that name; a twin that is its own is none."""
        own, twin = self._twins.get(name, (None, None))
        vars(self.pipeline)[name] = own if model is twin and own is not None else model

    @contextmanager
    def call(self, twin: Any) -> Iterator[None]:
        """A call of the pipeline. In a session of the user's own it is that session's."""
        models = transformers_of(self.pipeline)
        for model in models.values():
            refuse_two_caches(model)
        session = current_session()
        if not session.implicit:
            self._last.report = session.report
            yield
            return
        configs = {name: getattr(model, "config", None) for name, model in models.items()}
        made = Call(twin, configs, dict.fromkeys(_notes(self.pipeline)))
        self._last.report = made.report
        token = _under_way.set((*_under_way.get(), (self, made)))
        try:
            yield
        finally:
            _under_way.reset(token)
            made.close()

    def last_report(self) -> Report:
        """The report on the last call of this thread."""
        report: Callable[[], Report] | None = getattr(self._last, "report", None)
        if report is None:
            raise RuntimeError(
                f"last_report({type(self.pipeline).__name__}): the pipeline has not been called in "
                "this thread; call it first"
            )
        return report()


class PipelineTwin:
    """What the class of a twin adds to that of its pipeline. Copies and pickles are compiled."""

    __slots__ = ()
    _toca: State

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline, as one call of it."""
        with self._toca.call(self):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    @property
    def components(self) -> Any:
        """The pipeline's components; ``from_pipe`` gets the models, as it looks at their class."""
        found = super().components  # type: ignore[misc]
        if sys._getframe(1).f_code.co_name != "from_pipe":
            return found
        log.warning(
            "toca_fx: a pipeline that from_pipe makes is not compiled; toca_fx.compile(pipe) again"
        )
        return {**found, **transformers_of(self._toca.pipeline)}

    def __copy__(self) -> Any:
        return self._toca.again(copy.copy(self._toca.pipeline))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._toca.again(copy.deepcopy(self._toca.pipeline, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._toca.again, (self._toca.pipeline,)


def transformers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The models that a pipeline denoises with, by the names of their components."""
    return {
        name: value
        for name, value in sorted(getattr(pipeline, "__dict__", {}).items())
        if name.startswith("transformer") and isinstance(value, nn.Module)
    }


def pipeline_twin(
    pipeline: Pipeline, compile_model: Compile, again: Callable[[Any], Any]
) -> Pipeline:
    """A twin of ``pipeline``: it has its ``__dict__``, but the models in it are compiled.

    What is set on one, components, schedulers, adapters or hooks, is set on the other; calling
    ``pipeline`` itself runs what it ran before. ``again`` has to be picklable.
    """
    of = type(pipeline)
    names = [name for name in vars(pipeline) if name.startswith("transformer")]
    body = {
        "__slots__": ("_toca",),
        "__module__": of.__module__,
        "__qualname__": of.__qualname__,
        "__doc__": of.__doc__,
        **{name: _component(name) for name in names},
        **{name: staticmethod(getattr(of, name)) for name in _MAKERS if hasattr(of, name)},
    }
    made = types.new_class(
        of.__name__, (PipelineTwin, of), exec_body=lambda space: space.update(body)
    )
    twin: Any = object.__new__(made)
    object.__setattr__(twin, "__dict__", vars(pipeline))
    object.__setattr__(twin, "_toca", State(pipeline, compile_model, again))
    for name in transformers_of(pipeline):
        getattr(twin, name)  # what is refused is refused at once
    found: Pipeline = twin
    return found


def original_pipeline(pipeline: Any) -> Any:
    """The pipeline that a twin is a view of; any other is returned as it is."""
    return pipeline._toca.pipeline if isinstance(pipeline, PipelineTwin) else pipeline


def last_report(pipe: Any) -> Report:
    """The report on the last call of a compiled pipeline in this thread, ended well or not.

    All runs of the call are in it; its steps say kind, branch, component, timestep and run.

    Raises:
        TypeError: ``pipe`` is no pipeline that ``toca_fx.compile`` returned.
        RuntimeError: it has not been called in this thread.
    """
    if not isinstance(pipe, PipelineTwin):
        raise TypeError(
            f"last_report({type(pipe).__name__}): expected a pipeline that toca_fx.compile "
            "returned; a module has sessions, `with toca_fx.session(...) as run`, and run.report()"
        )
    return pipe._toca.last_report()


def _component(name: str) -> property:
    def get(twin: Any) -> Any:
        if name not in vars(twin):
            raise AttributeError(f"{type(twin).__name__} has no {name} any more")
        return twin._toca.component(name)

    def put(twin: Any, value: Any) -> None:
        twin._toca.replace(name, value)

    def drop(twin: Any) -> None:
        del vars(twin)[name]

    return property(get, put, drop)


@contextmanager
def _of_model(state: State | None, name: str) -> Iterator[None]:
    """A call of a pipeline's model: of the pipeline's call, if one is under way."""
    made = next((made for of, made in reversed(_under_way.get()) if of is state), None)
    if made is None or not current_session().implicit:
        yield
        return
    with made.of_model(name):
        yield


def _notes(pipeline: Any) -> tuple[str, ...]:
    """What the user should know of a pipeline's other models."""
    if isinstance(vars(pipeline).get("controlnet"), nn.Module):
        return ("the ControlNet runs uncached, at every step",)
    return ()
