"""Stubs: what Dynamo sees of weights that are away.

A stub is like the weight once it is in: class, shape, strides, dtype, device. It has no memory, and
nothing may compute with it. A weight has the same stub at every call, wherever it lay meanwhile: a
weight moved is not a weight changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toca_fx.capture.groups import Group, Slot

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)

Fingerprint = Callable[[Tensor], Hashable]


@dataclass
class _Known:
    """A stub, the tensor that it stands for (None: others each time), and what that was like."""

    stub: Tensor
    tensor: weakref.ref[Tensor] | None
    fingerprint: Hashable

    def is_of(self, tensor: Tensor | None, layout: tuple[Any, ...]) -> bool:
        """Whether it is the stub of ``tensor``, which will have that layout."""
        same = self.tensor is None if tensor is None else self.tensor and self.tensor() is tensor
        return bool(same) and layout_of(self.stub) == layout


class Stubs:
    """The stubs of one model; ``fingerprint`` tells whether a tensor was written to."""

    def __init__(self, fingerprint: Fingerprint) -> None:
        self._fingerprint = fingerprint
        self._known: weakref.WeakKeyDictionary[nn.Module, dict[str, _Known]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, slot: Slot, groups: Sequence[Group]) -> Tensor | None:
        """The stub of a weight that these groups bring in; None for a tensor of another class.

        One that was written to since the last call has a stub that was written to as well.
        """
        away = slot.tensor
        if type(away) not in _PLAIN:
            return None
        tensor, readable = groups[0].kept(slot)
        readable = readable and all(group.kept(slot)[1] for group in groups[1:])
        looked_at = away if tensor is None else tensor
        fingerprint = self._fingerprint(looked_at) if readable else None
        layout = _layout_in(away, groups)
        of_module = self._known.setdefault(slot.module, {})
        known = of_module.get(slot.name)
        if known is None or not known.is_of(tensor, layout):
            kept = None if tensor is None else weakref.ref(tensor)
            known = of_module[slot.name] = _Known(_made(layout), kept, fingerprint)
        elif known.fingerprint != fingerprint:
            torch.autograd.graph.increment_version(known.stub)
            known.fingerprint = fingerprint
        return known.stub


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """What Dynamo looks at in a tensor."""
    return (
        type(tensor),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
    )


def _layout_in(away: Tensor, groups: Sequence[Group]) -> tuple[Any, ...]:
    """The layout that a weight has once these groups have brought it in."""
    kind, shape, strides, dtype, device, has_gradient = layout_of(away)
    for group in groups:
        dtype, device = group.dtype or dtype, group.device or device
    return kind, shape, strides, dtype, device, has_gradient


def _made(layout: tuple[Any, ...]) -> Tensor:
    kind, shape, strides, dtype, device, has_gradient = layout
    with torch.inference_mode(False), torch.no_grad():
        made = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        made.untyped_storage().resize_(0)
    if kind is nn.Parameter:
        return nn.Parameter(made, requires_grad=has_gradient)
    return made


def like_stub(weight: Tensor, stub: Tensor) -> Tensor:
    """A weight as its stub announced it: as a rule it is."""
    alike = weight.stride() == stub.stride() and weight.device == stub.device
    if alike and weight.dtype == stub.dtype:
        return weight
    laid = torch.empty_strided(stub.shape, stub.stride(), dtype=stub.dtype, device=stub.device)
    return laid.copy_(weight.detach())
