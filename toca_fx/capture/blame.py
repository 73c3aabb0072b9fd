"""Which module keeps a model with tensors of classes of their own from being captured.

Dynamo names the line where it gave up, which is in the library of the class, or in torch.
"""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack
from typing import Any

from torch import nn

from toca_fx.capture.dynamo import capture
from toca_fx.capture.subclasses import Holder, holders_of
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.torch_private import is_wrapper, tree_leaves

log = logging.getLogger(__name__)


class Suspects:
    """The modules of ``model`` that hold tensors that wrap others, or hand such on."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given: dict[Holder, tuple[Any, dict[str, Any]]] = {}
        self._returned: dict[str, tuple[nn.Module, type]] = {}

    def call(self, *args: Any, **kwargs: Any) -> None:
        """Call the model, uncompiled, and see what its modules are given and return."""
        with ExitStack() as stack:
            for holder in holders_of(self._model):
                note = functools.partial(self._note_given, holder)
                hook = holder.module.register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(hook.remove)
            for path, module in self._model.named_modules():
                returned = functools.partial(self._note_returned, path)
                stack.callback(module.register_forward_hook(returned).remove)
            self._model(*args, **kwargs)

    def refuse(self) -> None:
        """Refuse the model if one of the modules cannot be captured by itself.

        Raises:
            UnsupportedModelError: it cannot.
        """
        for path, (module, kind) in self._returned.items():
            raise self._refusal(
                path,
                module,
                f"hands on a {kind.__module__}.{kind.__qualname__}, a tensor that "
                "wraps others. Quantise weights alone, no activations",
            )
        for holder, (args, kwargs) in self._given.items():
            try:
                capture(holder.module, args, kwargs)
            except UnsupportedModelError as error:
                log.debug("`%s` by itself: %s", holder.path, error)
                raise self._refusal(
                    holder.path,
                    holder.module,
                    f"computes with its {holder.name}, a "
                    f"{holder.kind}, which cannot be traced. Quantise it otherwise",
                ) from None

    def _refusal(self, path: str, module: nn.Module, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self._model).__name__} cannot be captured: `{path}` ({type(module).__name__}) "
            f"{why}, or leave this module, and others like it, as they were"
        )

    def _note_given(self, holder: Holder, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._given.setdefault(holder, (args, kwargs))

    def _note_returned(self, path: str, module: nn.Module, _: Any, output: Any) -> None:
        for value in tree_leaves(output):
            if is_wrapper(value):
                self._returned.setdefault(path, (module, type(value)))
