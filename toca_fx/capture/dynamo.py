"""Dynamo's graph of a model, without running or compiling it."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Sequence
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import fx, nn

from toca_fx.capture.sources import input_sources, line_in
from toca_fx.capture.subclasses import holders_of, refuse_opaque, unwrapped
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.torch_private import (
    BackendCompilerFailed,
    TorchDynamoException,
    TorchRuntimeError,
    forget_compiled_call,
    original_module,
)

log = logging.getLogger(__name__)

_OWN_ERROR = re.compile(
    "Explanation: (?:Dynamo.*?: got )?(.+)"
)  # what the model itself would have raised

Model = TypeVar("Model", bound=nn.Module)


class _Captured(Exception):  # noqa: N818 - no error
    """Ends a capture before anything runs."""


def _entry(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the model: Dynamo captures this function.

    The model is ``self``, so that the names of parameters are those in a compiled forward.
    """
    if not torch.compiler.is_dynamo_compiling():
        raise UnsupportedModelError(
            "Dynamo is switched off (TORCHDYNAMO_DISABLE or torch.compiler.set_stance)"
        )
    return self(*args, **kwargs)


def uncompiled(model: Model) -> Model:
    """A shallow copy of ``model`` that runs the model's own code, whatever compiled it before."""
    twin = copy.copy(original_module(model))
    forget_compiled_call(twin)
    return twin


def capture(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[fx.GraphModule, list[Any]]:
    """Dynamo's graph of one call, and its flat inputs, parameters and buffers among them.

    In the place of tensors that wrap others are these (see ``subclasses``).

    The model is not run. Dynamo keeps what it compiled, and the shapes it saw, with the code it
    captured: here that is code of our own, made anew each time, and with ``dynamic=False`` no shape
    is remembered. The model's own code is inlined and stays untouched.

    Raises:
        UnsupportedModelError: the model cannot be captured as one graph, or has a parameter of a
            class that cannot be followed.
    """
    refuse_opaque(model)
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def stop(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        input_sources(graph)
        # A copy: since torch 2.15 Dynamo empties the graph of a compilation that fails, and this
        # one is made to.
        found.append((fx.GraphModule(graph, copy.deepcopy(graph.graph)), list(inputs)))
        raise _Captured

    entry = FunctionType(_entry.__code__.replace(), globals(), "entry")
    try:
        with torch.no_grad():
            compiled = torch.compile(entry, backend=stop, fullgraph=True, dynamic=False)
            compiled(model, *args, **kwargs)
    except BackendCompilerFailed as error:
        if not found:
            raise UnsupportedModelError(_reason(model, error)) from error
    except TorchDynamoException as error:
        raise UnsupportedModelError(_reason(model, error)) from error
    if not found:
        raise UnsupportedModelError("the model computes nothing with tensors")
    graph, inputs = found[0]
    plain, unwrapping = unwrapped(graph, inputs)
    return plain, list(unwrapping(inputs))


def _reason(model: nn.Module, error: Exception) -> str:
    """Where Dynamo gave up, in our words; its own are in the debug log."""
    log.debug("%s: %s", type(model).__name__, error)
    line = line_in(str(error))
    at = f"at {line} " if line else ""
    if isinstance(error, TorchRuntimeError):  # of the model's own: shapes do not fit, say
        said = _OWN_ERROR.search(str(error))
        why = f"({said[1]})" if said else ""
        return f"the model cannot be captured as one graph: {at}it fails {why}".rstrip()
    held = next(holders_of(model), None)
    wrapper = f", such as what a {held.kind} does, as `{held.path}` has one" if held else ""
    return (
        f"the model cannot be captured as one graph: {at}values of tensors decide on the way "
        f"through the code, or something cannot be traced{wrapper}. What can be made before the "
        "run, a number, a mask or a list, hand in; toca_fx.compile captures other models in "
        "several graphs, if it can"
    )
