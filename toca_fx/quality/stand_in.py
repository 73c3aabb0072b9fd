"""A model in whose place something else answers, inside the user's own sampling loop."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

Answer: TypeAlias = Callable[..., object]
"""Called as the model is."""

Sample: TypeAlias = Callable[[Answer], Tensor]
"""One generation with what answers in the model's place; the final result, on the host."""


def standing_in(model: nn.Module, answer: Answer) -> nn.Module:
    """A view of ``model`` whose calls go to ``answer``, and which is that model in all else.

    Both have one ``__dict__``, as a twin and its model; calls of ``model`` itself are its own.
    """
    of = type(model)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        return answer(*args, **kwargs)

    body = {"__call__": call, "__module__": of.__module__, "__qualname__": of.__qualname__}
    made = types.new_class(of.__name__, (of,), exec_body=lambda space: space.update(body))
    view: nn.Module = object.__new__(made)
    object.__setattr__(view, "__dict__", vars(model))
    return view


def only_tensor(output: object) -> Tensor:
    """What a model returns as one tensor, alone or inside tuples, mappings, outputs of diffusers.

    Raises:
        TypeError: it is none, or several.
    """
    found = _tensors(output)
    if len(found) != 1:
        raise TypeError(
            f"the model returns {len(found)} tensors of floating-point numbers, in a "
            f"{type(output).__name__}; a forecast is of one"
        )
    return found[0]


def with_tensor(output: object, value: Tensor) -> object:
    """``output`` with its only tensor replaced by ``value``."""
    leaves, form = tree_flatten(output)
    return tree_unflatten([value if _is_float(leaf) else leaf for leaf in leaves], form)


def latents_of(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor:
    """The latents of a model call: its first tensor of floating-point numbers with several axes.

    Raises:
        TypeError: there is none.
    """
    for leaf in _tensors((args, kwargs)):
        if leaf.ndim > 1:
            return leaf
    raise TypeError("the model is called without latents: no argument is a floating-point tensor")


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if _is_float(leaf)]


def _is_float(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and torch.is_floating_point(leaf)
