"""Calls of a module that Dynamo captures as one graph, or in several where it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from toca_fx.capture.blame import Suspects
from toca_fx.capture.functionalize import WeightsWrittenError
from toca_fx.capture.sources import line_in
from toca_fx.capture.subclasses import refuse_opaque
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.torch_private import (
    BackendCompilerFailed,
    InternalTorchDynamoError,
    TorchDynamoException,
    TorchRuntimeError,
    Unsupported,
    UserError,
    captured_any_number_of_times,
    compiled_call,
)

log = logging.getLogger(__name__)

# What Dynamo raises where it cannot go on; what it says is not for users.
_NOT_CAPTURED = (Unsupported, UserError, TorchRuntimeError, InternalTorchDynamoError)


# Brings in all weights that are away during a call: what runs uncompiled cannot ask for them.
bring_in: ContextVar[Callable[[], None] | None] = ContextVar("toca_fx_bring_in", default=None)


# The call of a module, in several graphs, that what is run now belongs to.
current_call: ContextVar[object] = ContextVar("toca_fx_call", default=None)


def _come_in() -> None:
    bring = bring_in.get()
    if bring is not None:
        bring()


class WholeOrParts:
    """Calls ``module`` as one graph, compiled by ``whole``.

    From the first call that Dynamo cannot capture so, it is captured in several graphs, which
    ``parts`` compiles: what decides on the way through the code is run between them. Both are
    backends that say whether sizes are symbolic from the first call on (``dynamic``).
    """

    def __init__(self, module: nn.Module, whole: Any, parts: Any) -> None:
        self._module, self._parts = module, parts
        self._whole: Callable[..., Any] | None = compiled_call(module, whole, dynamic=whole.dynamic)
        self._broken = compiled_call(module, parts, whole=False, dynamic=parts.dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module.

        Raises:
            UnsupportedModelError: it can be captured in no way, or not be followed.
        """
        if torch.compiler.is_dynamo_compiling():  # as a part of something else
            return self._broken(*args, **kwargs)
        try:
            with captured_any_number_of_times():
                return self._call(*args, **kwargs)
        except BackendCompilerFailed as error:
            ours = error.inner_exception
        except TorchDynamoException as error:
            at = line_in(str(error))
            ours = UnsupportedModelError(
                f"{type(self._module).__name__} cannot be captured, as one graph or in several"
                f"{f', because of {at}' if at else ''}: leave it uncompiled, or what is called "
                "there out of it"
            )
            ours.__cause__ = error
        raise ours

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._whole is not None:
            with suppress(*_NOT_CAPTURED, WeightsWrittenError):
                return self._whole(*args, **kwargs)
            refuse_opaque(self._module)
            _come_in()
            # What a model does at its first call only (it makes tables; peft takes out of the
            # weights what was fused and disabled) is done at the second.
            suspects = Suspects(self._module)
            suspects.call(*args, **kwargs)
            try:
                return self._whole(*args, **kwargs)
            except _NOT_CAPTURED as error:
                reason = str(error)
            suspects.refuse()
            self._whole = None
            self._say(reason)
        _come_in()
        token = current_call.set(object())
        try:
            return self._broken(*args, **kwargs)
        finally:
            current_call.reset(token)

    def _say(self, reason: str) -> None:
        """Warn, in our words; Dynamo's are in the debug log."""
        log.debug("captured in several graphs: %s", reason)
        at = line_in(reason)
        log.warning(
            "toca_fx: %s cannot be captured as one graph%s: values of tensors decide there on the "
            "way through the code. It is captured in several: those without an attention or MLP "
            "run at every step, and if there is more than one with, each is cached by itself. "
            "Where a number, a mask or a list can be made before the run, hand it in",
            type(self._module).__name__,
            f", because of {at}" if at else "",
        )
