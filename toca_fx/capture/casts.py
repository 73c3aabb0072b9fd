"""Regions of autocast -> casts, so that what a graph computes depends on its edges only.

    with autocast("cpu", bfloat16):            linear(to(x, bfloat16), to(weight, bfloat16))
        linear(x, weight)                ->

A graph whose nodes are moved, dropped and cut into pieces cannot have regions, the caller's least
of all: where it is run, nobody knows them. Which operators are cast, and to what, torch's own
kernels say, as they are what is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.capture.inline import codes_of
from toca_fx.graph.autocast import Autocast
from toca_fx.graph.fragments import Fragments
from toca_fx.graph.ops import RELAYOUTS
from toca_fx.torch_private import (
    OpOverload,
    call_kernel,
    enter_autocast,
    exit_autocast,
    has_kernel,
    is_switch,
    tree_leaves,
)

_STATE = "autocast"
_COMPOSITE = "CompositeImplicitAutograd"


def autocast_of(graph: fx.Graph, around: Callable[[fx.Node], Autocast]) -> dict[fx.Node, Autocast]:
    """The state in which each node is run: that of the region it is in, or else the one ``around``.

    The nodes that begin and end regions are left out.
    """
    found: dict[fx.Node, Autocast] = {}
    entered: dict[Any, Autocast] = {}
    for node in graph.nodes:
        state = next(reversed(entered.values())) if entered else around(node)
        if node.target is enter_autocast:
            with state.again(), torch.autocast(*node.args):
                entered[node] = Autocast.now()
        elif node.target is exit_autocast:
            del entered[node.args[0]]
        else:
            found[node] = state
    return found


def note(node: fx.Node, state: Autocast) -> None:
    """Note on a traced node that it was run in ``state``, and the code that it is given, too."""
    if state.dtypes and isinstance(node.target, OpOverload):
        node.meta[_STATE] = state
    for code in codes_of(node):
        note_all(code.graph, lambda _: state)


def note_all(graph: fx.Graph, around: Callable[[fx.Node], Autocast]) -> None:
    """Note on all nodes in which state they were run (see ``autocast_of``); no switch is left."""
    for node, state in autocast_of(graph, around).items():
        note(node, state)
    for node in reversed(graph.nodes):
        if is_switch(node.target):
            graph.erase_node(node)


def forget(node: fx.Node) -> None:
    """Autocast leaves alone what ``node`` stands for, whatever its operator: a write in place."""
    node.meta.pop(_STATE, None)


def bake(graph: fx.Graph) -> None:
    """Put into ``graph`` the casts that autocast makes around its nodes, as was noted on them.

    Nothing may be written in place: new values share no memory with others.
    """
    fragments = Fragments(graph)
    for node in list(graph.nodes):
        state = node.meta.pop(_STATE, None)
        if state is not None:
            _cast(node, state, fragments)
        for code in codes_of(node):
            bake(code.graph)
            code.recompile()


def _cast(node: fx.Node, state: Autocast, fragments: Fragments) -> None:
    """Replace a node by what autocast in ``state`` makes of it, if that is something else."""
    found = _kernel(node, state)
    if found is None or not _matters(node, state, fragments):
        return
    kernel, rest = found
    for part in fragments.replace(node, kernel):
        _cast(part, rest, fragments)


def _matters(node: fx.Node, state: Autocast, fragments: Fragments) -> bool:
    """Whether autocast in ``state`` makes something else of a node."""
    found = _kernel(node, state)
    if found is None:
        return False
    kernel, rest = found
    traced = fragments.traced(kernel, node.args, node.kwargs)
    parts = [part for part in traced.nodes if part.op == "call_function"]
    if rest == state:
        return any(_matters(part, rest, fragments) for part in parts)
    return [_described(part) for part in parts] != [_described(node)]


def _described(node: fx.Node) -> object:
    """What a node calls, and with what, but for the names of its operands."""
    operands = node.all_input_nodes
    return node.target, repr(fx.node.map_arg((node.args, node.kwargs), operands.index))


def _kernel(node: fx.Node, state: Autocast) -> tuple[Callable[..., Any], Autocast] | None:
    """What is called for a node in ``state``, and in which state its parts are; None: itself.

    It is a kernel that casts, and is off for its parts; or the operator is made of others, and
    autocast is left to these.
    """
    op = node.target
    if not isinstance(op, OpOverload) or op in RELAYOUTS:
        return None
    values = (value for of in node.all_input_nodes for value in tree_leaves(of.meta.get("val")))
    devices = {value.device.type for value in values if isinstance(value, Tensor)}
    on = [device for device, _ in state.dtypes if device in devices]
    for device in reversed(on):  # in the order of the dispatcher
        if has_kernel(op, f"Autocast{device.upper()}"):
            key = f"Autocast{device.upper()}"
            return functools.partial(_call, op, key, state), state.without(device)
    backends = [key for device in on for key in (device.upper(), f"Autograd{device.upper()}")]
    if on and has_kernel(op, _COMPOSITE) and not any(has_kernel(op, key) for key in backends):
        return functools.partial(_call, op, _COMPOSITE, state), state
    return None


def _call(op: OpOverload, key: str, state: Autocast, *args: Any, **kwargs: Any) -> Any:
    with state.again():
        return call_kernel(op, key, args, kwargs)
