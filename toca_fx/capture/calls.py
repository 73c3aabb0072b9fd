"""Calls of a module that Dynamo captures as one graph, or in several where it cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from toca_fx.capture.sources import line_in
from toca_fx.torch_private import Unsupported, UserError, compiled_call

log = logging.getLogger(__name__)


class WholeOrParts:
    """Calls ``module`` as one graph, compiled by ``whole``.

    From the first call that Dynamo cannot capture so, it is captured in several graphs, which
    ``parts`` compiles: what decides on the way through the code is run between them.
    """

    def __init__(self, module: nn.Module, whole: Any, parts: Any) -> None:
        self._module, self._parts = module, parts
        self._whole: Callable[..., Any] | None = compiled_call(module, whole)
        self._broken = compiled_call(module, parts, whole=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        if self._whole is not None:
            try:
                return self._whole(*args, **kwargs)
            except (Unsupported, UserError) as error:
                reason = str(error)
            self._whole = None
            self._say(reason)
        return self._broken(*args, **kwargs)

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
