"""Writes in place -> new values, so that what a graph computes depends on its edges only.

``x[:, n:] = y`` is ``copy_(slice(x), y)`` in ATen. It becomes ``slice_scatter(x, y)``, and all
later readers of that memory, of x or of another view of it, read the new value. Memory that the
caller can see (inputs, parameters) must not be written; for buffers see ``updates``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.capture.casts import forget
from toca_fx.capture.sources import user_line
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.graph.axes import shape_of
from toca_fx.graph.ops import PERMUTES, RESHAPES, SAME, aten, operands
from toca_fx.torch_private import storage_id


class WeightsWrittenError(UnsupportedModelError):
    """The model writes to its own weights; some do so at one call, and not at the next."""


def make_functional(node: fx.Node, own: Collection[fx.Node] = ()) -> None:
    """Replace a node that writes in place by one that returns the new value.

    Later readers of the memory read the new value instead. ``own`` are the inputs to which a write
    is nothing but that; ``meta["state"]`` says of an input that it is the model's own.

    Raises:
        WeightsWrittenError: the memory is that of a weight.
        UnsupportedModelError: the memory belongs to the caller, or a view in between cannot be
            written through.
    """
    mutated = node.args[0]
    if not isinstance(mutated, fx.Node):
        raise _refusal(node, "what it writes to is no tensor of the graph")
    aliases = _aliases(node, mutated)
    outer = [one for one in aliases if one.op in ("placeholder", "get_attr") and one not in own]
    if outer:
        weights = all(one.meta.get("state") for one in outer)
        kind = WeightsWrittenError if weights else UnsupportedModelError
        raise _refusal(node, "the caller sees that memory", kind)
    later = _later_users(node, aliases)
    graph = node.graph
    with graph.inserting_before(node):
        value = _new_value(node, mutated)
        renewed = {mutated: value}
        view = mutated
        while any(users for alias, users in later.items() if not _is_view_of(alias, view)):
            source = view.args[0]
            if not isinstance(source, fx.Node) or source not in aliases:
                other = next(alias for alias, users in later.items() if users and alias is not view)
                raise _refusal(node, f"it is also read as {other}")
            renewed[source] = _write_through(node, view, source, renewed[view])
            view = source
        for alias in aliases:  # in order: a view comes after what it is a view of
            if alias not in renewed and any(
                users for other, users in later.items() if _is_view_of(other, alias)
            ):
                renewed[alias] = graph.node_copy(
                    alias, lambda operand: renewed.get(operand, operand)
                )
    node.replace_all_uses_with(value)
    graph.erase_node(node)
    for alias, users in later.items():
        for user in users:
            user.replace_input_with(alias, renewed[alias])


def _aliases(node: fx.Node, mutated: fx.Node) -> list[fx.Node]:
    """All nodes before ``node`` that share the memory of ``mutated``, in order."""
    storage = _storage(mutated)
    found: list[fx.Node] = []
    for other in node.graph.nodes:
        if other is node:
            return found
        if _storage(other) == storage:
            found.append(other)
    return found


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return storage_id(value) if isinstance(value, Tensor) else None


def _later_users(node: fx.Node, aliases: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    after: set[fx.Node] = set()
    following = node.next
    while following.op != "root":
        after.add(following)
        following = following.next
    return {alias: [user for user in alias.users if user in after] for alias in aliases}


def _is_view_of(node: Any, source: fx.Node) -> bool:
    while isinstance(node, fx.Node):
        if node is source:
            return True
        is_view = node.args and _storage(node) == _storage(source) and "renewed" not in node.meta
        node = node.args[0] if is_view else None
    return False


def _new_value(node: fx.Node, mutated: fx.Node) -> fx.Node:
    """What the memory holds after the write."""
    target: Any = node.target
    old: Tensor = mutated.meta["val"]
    if target is aten.copy_.default:
        value = node.args[1]
        new = value.meta["val"] if isinstance(value, fx.Node) else None
        if isinstance(value, fx.Node) and isinstance(new, Tensor):
            if new.dtype != old.dtype:
                value = _call(
                    node, aten.to.dtype, (value, old.dtype), torch.empty_like(new, dtype=old.dtype)
                )
            if new.shape != old.shape:
                value = _call(
                    node, aten.expand.default, (value, list(old.shape)), torch.empty_like(old)
                )
            # A copy: what was copied may be written to later. Compilers drop it.
            return _call(node, aten.clone.default, (value,), old, {"memory_format": _format(old)})
    if target is aten.fill_diagonal_.default and old.dim() == 2 and len(node.args) == 2:
        diagonal = old.diagonal()
        picked = _call(node, aten.diagonal.default, (mutated,), diagonal)
        filled = _call(node, aten.full_like.default, (picked, node.args[1]), diagonal)
        return _call(node, aten.diagonal_scatter.default, (mutated, filled), old)
    name, _, overload = target.name().removeprefix("aten::").partition(".")
    packet = getattr(aten, name.removesuffix("_"), None)
    functional = getattr(packet, overload or "default", None)
    if functional is None or functional is target:
        raise _refusal(node, "it has no counterpart that returns a new tensor")
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    result: Tensor = functional(*args, **kwargs)
    if result.dtype == old.dtype:
        return _call(node, functional, node.args, old, node.kwargs)
    # The memory keeps its dtype, whatever the operator returns.
    return _call(
        node,
        aten.to.dtype,
        (_call(node, functional, node.args, result, node.kwargs), old.dtype),
        old,
    )


def _format(old: Tensor) -> torch.memory_format:
    return torch.contiguous_format if old.is_contiguous() else torch.preserve_format


def _laid_out(node: fx.Node, value: fx.Node, old: Tensor) -> fx.Node:
    """``value`` with its elements in the order of ``old``, as far as later views may rely on it."""
    return _call(node, aten.contiguous.default, (value,), old) if old.is_contiguous() else value


def _write_through(node: fx.Node, view: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node:
    """``source`` after ``value`` has been written to its view ``view``."""
    old: Tensor = source.meta["val"]
    if view.target is aten.slice.Tensor:
        return _call(node, aten.slice_scatter.default, (source, value, *view.args[1:]), old)
    if view.target is aten.select.int:
        return _call(node, aten.select_scatter.default, (source, value, *view.args[1:]), old)
    if view.target in PERMUTES:
        order = _order(view, source)
        back = sorted(range(len(order)), key=order.__getitem__)
        return _laid_out(node, _call(node, aten.permute.default, (value, back), old), old)
    if view.target in RESHAPES:
        return _call(node, aten.reshape.default, (value, list(old.shape)), old)
    if view.target in SAME:
        return value
    raise _refusal(node, f"it goes through {view.target}, which cannot be followed")


def _order(view: fx.Node, source: fx.Node) -> list[int]:
    """Which axis of ``source`` each axis of a permuted view is."""
    rank = len(shape_of(view))
    return [(operands(view, axis) or {})[source] for axis in range(rank)]


def _call(node: fx.Node, target: Any, args: Any, like: Tensor, kwargs: Any = None) -> fx.Node:
    new: fx.Node = node.graph.call_function(target, tuple(args), dict(kwargs or {}))
    # It stands for the memory that it renews, so that later writes find it.
    new.meta = {**node.meta, "val": like, "renewed": True}
    forget(new)
    return new


def _refusal(
    node: fx.Node, why: str, kind: type[UnsupportedModelError] = UnsupportedModelError
) -> UnsupportedModelError:
    module = node.meta.get("path") or "(top level)"
    return kind(
        f"the model writes to a tensor in place ({node.target}, in module {module}, at "
        f"{user_line(node)}) and {why}; "
        "write it without the trailing underscore, or exclude the module from compilation"
    )
