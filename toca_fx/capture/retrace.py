"""Dynamo's graph -> pre-dispatch ATen: each call is traced once, and copied where it comes again.

A trace takes about a millisecond per operator, and models are block after block of the same calls
on operands of the same layout. Dynamo leaves on its nodes what they return, so that equal calls are
known ahead of any trace.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import preserve_node_meta, set_current_meta

from toca_fx.capture.casts import autocast_of, note, note_all
from toca_fx.capture.interpret import SEEN, Interpreter
from toca_fx.graph.autocast import Autocast
from toca_fx.graph.fragments import Decompositions
from toca_fx.torch_private import (
    FakeTensor,
    FakeTensorMode,
    detect_fake_mode,
    is_mutable,
    is_switch,
    is_wrapper,
    trace,
    tree_leaves,
    tree_map,
)

log = logging.getLogger(__name__)

# What a traced node has from the node that it was traced for.
_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")
_NUMBER = re.compile(r"_\d+$")


class _NotCopied(Exception):  # noqa: N818 - no error
    """Why a graph is not certain to be what copies of its calls make."""


@dataclass(frozen=True)
class _Body:
    """What a call was traced to: ``nodes``, in order, which read ``operands`` and each other.

    It returns ``returned``, nodes of either. ``as_is`` has the operands that are returned as they
    are: the position among what is returned, and that among the operands.
    """

    operands: Sequence[fx.Node]
    nodes: Sequence[fx.Node]
    returned: Any
    as_is: Sequence[tuple[int, int]]


def retrace(
    captured: fx.GraphModule, fakes: Sequence[Any], decompositions: Decompositions
) -> fx.GraphModule:
    """The graph of ``captured`` in pre-dispatch ATen, for inputs like ``fakes``.

    ``fakes`` are fake tensors of one mode, or numbers. What nodes return has the dtype that
    autocast gives it, in regions of ``captured`` and in the caller's; the casts are not there yet
    (see ``casts.bake``). Values of nodes may be one fake tensor where nodes are equal; they share
    memory as they would in a run only if something is written in place.

    Raises:
        UnsupportedModelError: a number or a size depends on the values of tensors, or an operator
            that is given code cannot be traced.
    """
    now = Autocast.now()
    states = autocast_of(captured.graph, lambda _: now)
    wrappers = any(
        is_wrapper(value)
        for node in captured.graph.nodes
        for value in tree_leaves(node.meta.get("example_value"))
    )
    try:
        if wrappers:
            raise _NotCopied("there are tensors that wrap others")
        return _retrace_calls(captured, fakes, decompositions, states)
    except _NotCopied as reason:
        log.debug("all calls are traced, equal ones too: %s", reason)
    traced = _trace(Interpreter(captured, states).run, fakes, decompositions, wrappers=wrappers)
    by_name = {node.name: state for node, state in states.items()}

    def of_call(node: fx.Node) -> Autocast:
        source = node.meta.get("from_node")
        return by_name[source[0].name] if source else now

    note_all(traced.graph, of_call)  # a call may have regions of its own
    for node in traced.graph.nodes:
        node.meta.pop("from_node", None)
    return traced


def _retrace_calls(
    captured: fx.GraphModule,
    fakes: Sequence[Any],
    decompositions: Decompositions,
    states: Mapping[fx.Node, Autocast],
) -> fx.GraphModule:
    """The same, put together of copies.

    Raises:
        _NotCopied: it might differ from the trace of the whole graph.
    """
    mode = detect_fake_mode(fakes)
    if mode is None:
        raise _NotCopied("no input is a tensor")
    inputs = captured.graph.find_nodes(op="placeholder")
    for node, fake in zip(inputs, fakes, strict=True):
        if node.users and _layout_of(node) != _layout(fake):
            raise _NotCopied(f"{node} is no longer what it was")
    firsts = _first_equals(captured.graph, states)
    bodies = _trace_each(dict.fromkeys(firsts.values()), mode, decompositions, states)
    copies = _Copies()
    for node, fake in zip(inputs, fakes, strict=True):
        copies.put_input(node, fake)
    for node, first in firsts.items():
        copies.put(node, bodies[first], states[node])
    copies.put_output(captured.graph.output_node())
    return fx.GraphModule(nn.Module(), copies.graph)


def _trace(
    function: Callable[..., Any],
    values: Sequence[Any],
    decompositions: Decompositions,
    *,
    wrappers: bool = False,
) -> fx.GraphModule:
    """The graph of ``function`` for ``values``; nodes tell for which they were traced."""
    with preserve_node_meta():
        return trace(function, values, decompositions, wrappers=wrappers)


def _first_equals(graph: fx.Graph, states: Mapping[fx.Node, Autocast]) -> dict[fx.Node, fx.Node]:
    """The first call that is equal to it for each call, itself or an earlier one; in order."""
    by_sign: dict[object, fx.Node] = {}
    calls = [
        node
        for node in graph.nodes
        if node.op not in ("placeholder", "output") and not is_switch(node.target)
    ]
    return {node: by_sign.setdefault((_sign(node), states[node]), node) for node in calls}


def _sign(call: fx.Node) -> object:
    """What a call does and on what; with its state, equal for calls that can be copies."""
    if call.op not in ("call_function", "call_method"):
        raise _NotCopied(f"{call} is a {call.op}")
    if call.is_impure():
        raise _NotCopied(f"{call} does more than to return something")
    at = {operand: number for number, operand in enumerate(call.all_input_nodes)}

    def name(operand: fx.Node) -> str:
        return f"%{at[operand]}: {_layout_of(operand)}"

    arguments = repr(fx.node.map_arg((call.args, call.kwargs), name))
    return call.target, arguments, _layout_of(call)


def _layout_of(node: fx.Node) -> object:
    """The layout of what a node of Dynamo's graph returns."""
    try:
        return _layout(node.meta.get("example_value"))
    except _NotCopied as reason:
        raise _NotCopied(f"{node} returns {reason}") from None


def _layout(value: Any) -> object:
    """How a tensor, or each of several, lies in memory."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_layout, value))
    if type(value) not in (Tensor, nn.Parameter, FakeTensor) or value.layout is not torch.strided:
        raise _NotCopied(f"a value of another type than a plain tensor: {type(value).__name__}")
    sizes = (*value.shape, *value.stride())
    if any(type(size) is not int for size in sizes) or value.is_conj() or value.is_neg():
        raise _NotCopied("a tensor with a size that is no number, or with a lazy conjugate")
    return value.shape, value.stride(), value.dtype, value.device


def _trace_each(
    calls: Iterable[fx.Node],
    mode: FakeTensorMode,
    decompositions: Decompositions,
    states: Mapping[fx.Node, Autocast],
) -> dict[fx.Node, _Body]:
    """What each of ``calls`` is traced to, all of them in one trace, on operands of its own."""
    given = {call: _operands_like(call, mode) for call in calls}
    as_is: dict[fx.Node, list[tuple[int, int]]] = {}

    def call_each(*values: Tensor) -> list[Any]:
        leaves = iter(values)
        results = []
        for call, fakes in given.items():
            operands = [next(leaves) for _ in fakes]
            with states[call].again():
                results.append(_run(call, operands))
            as_is[call] = [
                (at, of)
                for at, result in enumerate(tree_leaves(results[-1]))
                for of, operand in enumerate(operands)
                if result is operand
            ]
        return results

    values = [leaf for fakes in given.values() for leaf in fakes]
    traced = _trace(call_each, values, decompositions).graph
    nodes, leaves = _by_call(traced), iter(traced.find_nodes(op="placeholder"))
    returned: Any = traced.output_node().args[0]
    return {
        call: _Body([next(leaves) for _ in fakes], nodes.get(call.name, ()), result, as_is[call])
        for (call, fakes), result in zip(given.items(), returned, strict=True)
    }


def _operands_like(call: fx.Node, mode: FakeTensorMode) -> list[Tensor]:
    """Tensors like those that a call is given, in memory of their own."""
    with mode:
        return [
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            for operand in call.all_input_nodes
            for value in tree_leaves(operand.meta["example_value"])
        ]


def _run(call: fx.Node, operands: Iterable[Tensor]) -> Any:
    """What a call returns for ``operands``; nodes that are traced meanwhile tell its name."""
    leaves = iter(operands)
    values = {
        node: tree_map(lambda _: next(leaves), node.meta["example_value"])
        for node in call.all_input_nodes
    }
    args, kwargs = fx.node.map_arg((call.args, call.kwargs), values.__getitem__)
    target: Any = call.target
    try:
        with set_current_meta(call):
            if call.op == "call_method":
                result = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                result = SEEN.get(target, target)(*args, **kwargs)
    except RuntimeError as error:  # reads a number out of another call, say
        raise _NotCopied(f"{call} cannot be run by itself: {error}") from error
    if _layout(result) != _layout_of(call):
        raise _NotCopied(f"{call} returns something else if it is run by itself")
    return result


def _by_call(traced: fx.Graph) -> dict[str, list[fx.Node]]:
    """The nodes that were traced for each call, by its name."""
    found: dict[str, list[fx.Node]] = {}
    for node in traced.nodes:
        if node.op in ("placeholder", "output"):
            continue
        source = node.meta.pop("from_node", None)
        if node.op != "call_function" or not source:
            raise _NotCopied(f"{node} belongs to no call")
        if is_switch(node.target):
            raise _NotCopied(f"{source[0].name} has a region of its own")
        # Only where something is written it matters which values share memory.
        if is_mutable(node.target) and node.target is not torch.ops.aten.detach_.default:
            raise _NotCopied(f"{source[0].name} writes in place")
        found.setdefault(source[0].name, []).append(node)
    return found


class _Copies:
    """``graph``, put together of bodies for the nodes of Dynamo's graph, in its order."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self._inputs = 0
        self._put: dict[fx.Node, Any] = {}
        # A tracer knows tensors by identity: where a call returns an operand as it is, whoever
        # reads the operand later reads what was returned.
        self._renamed: dict[fx.Node, fx.Node] = {}

    def put_input(self, node: fx.Node, fake: Any) -> None:
        """Put the next placeholder, of value ``fake``, in the place of ``node``."""
        self._inputs += 1
        self._put[node] = self.graph.placeholder(f"arg{self._inputs - 1}_1")
        self._put[node].meta["val"] = fake

    def put(self, call: fx.Node, body: _Body, state: Autocast) -> None:
        """Put a copy of ``body``, which was traced in ``state``, in the place of ``call``."""
        operands = [
            self._latest(leaf)
            for operand in call.all_input_nodes
            for leaf in tree_leaves(self._put[operand])
        ]
        inherited = {key: call.meta[key] for key in _INHERITED if key in call.meta}
        copies = dict(zip(body.operands, operands, strict=True))
        for node in body.nodes:
            args, kwargs = _mapped((node.args, node.kwargs), copies)
            name = _NUMBER.sub("", node.name)
            copy = self.graph.create_node("call_function", node.target, args, kwargs, name)
            copy.meta = {**node.meta, **inherited}
            note(copy, state)
            copies[node] = copy
        self._put[call] = _mapped(body.returned, copies)
        returned = tree_leaves(self._put[call])
        for at, of in body.as_is:
            if returned[at] is not operands[of]:
                self._renamed[operands[of]] = returned[at]

    def put_output(self, node: fx.Node) -> None:
        """Put an output in the place of ``node``, that of Dynamo's graph."""
        results = fx.node.map_arg(node.args[0], self._put.__getitem__)
        self.graph.output(fx.node.map_arg(results, self._latest))

    def _latest(self, leaf: fx.Node) -> fx.Node:
        while leaf in self._renamed:
            leaf = self._renamed[leaf]
        return leaf


def _mapped(argument: Any, copies: Mapping[fx.Node, fx.Node]) -> Any:
    """``argument`` with copies for nodes."""

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:
            raise _NotCopied(f"{node} is shared by calls")
        return copies[node]

    return fx.node.map_arg(argument, copy_of)
