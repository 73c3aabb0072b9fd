"""A view of a module that runs compiled, and is that module in everything else."""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import nn

from toca_fx.capture.calls import WholeOrParts
from toca_fx.torch_private import COMPILED_CALL, original_module

Model = TypeVar("Model", bound=nn.Module)


class Twin:
    """What the class of a twin adds to that of its model: that, and the backend that compiles it.

    Copies and pickles are the model's, and not compiled.
    """

    __slots__ = ()
    _toca_model: nn.Module
    _toca_backend: Any

    def __init_subclass__(cls) -> None:
        """Nothing is registered: the class of a twin is no new kind of model."""

    def __copy__(self) -> Any:
        return copy.copy(self._toca_model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._toca_model, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A pickle of the model, which loads where there is no toca_fx too.
        return operator.getitem, ([self._toca_model], 0)


def twin_of(
    model: Model,
    backend: Any,
    parts: Any,
    methods: Mapping[str, Any] | None = None,
    around: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Model:
    """A twin of ``model`` that is compiled by ``backend`` as one graph, with some ``methods`` more.

    Where Dynamo cannot capture it as one, ``parts`` compiles several.

    Both have one ``__dict__``: whatever is set on one, hooks and submodules included, is set on the
    other. The compiled call alone is the twin's own, in a slot, for which it needs a class of its
    own: a subclass by the model's name. What Dynamo captures is the model. ``around`` makes of the
    model and its compiled call what calling the twin runs.
    """
    module = original_module(model)
    module = cast("Model", getattr(module, "_toca_model", module))
    of = type(module)
    body = {
        "__slots__": (COMPILED_CALL, "_toca_model", "_toca_backend"),
        "__module__": of.__module__,
        "__qualname__": of.__qualname__,
        "__doc__": of.__doc__,
        **(methods or {}),
    }
    made = types.new_class(of.__name__, (Twin, of), exec_body=lambda space: space.update(body))
    twin: Any = object.__new__(made)
    compiled = WholeOrParts(module, backend, parts)
    own = {
        "__dict__": vars(module),
        "_toca_model": module,
        "_toca_backend": backend,
        COMPILED_CALL: compiled if around is None else around(module, compiled),
    }
    for name, value in own.items():
        object.__setattr__(twin, name, value)
    return cast("Model", twin)
