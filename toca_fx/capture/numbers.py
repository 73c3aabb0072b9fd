"""Numbers that a model reads out of tensors, and sizes that depend on what tensors hold.

Text lengths (``mask.sum(1).tolist()``), the side of an image (``height[0].item()``), a caption
without its padding (``y[mask]``, ``masked_select``): Dynamo captures them as unknown numbers. Here
a graph is made for the numbers of one call; whoever keeps it compares those of later calls.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.capture.inline import inlined
from toca_fx.capture.sources import user_line
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.graph.edit import ancestors, put_value, used_inputs
from toca_fx.graph.ops import aten
from toca_fx.torch_private import enter_autocast, exit_autocast

Number = int | float | bool | str
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class _Read:
    """How a node reads a number: out of the tensor ``source``, by ``number``.

    ``fixed`` computes the node if the number is known, from the node's arguments and the number;
    without it the node is the number.
    """

    source: fx.Node
    number: Callable[[Tensor], Any]
    fixed: Callable[..., Any] | None = None


class Numbers:
    """The numbers that Dynamo's graph reads out of tensors; false if it reads none.

    ``reads`` are the positions of the inputs that they depend on.
    """

    def __init__(self, captured: fx.GraphModule) -> None:
        self._captured = inlined(captured)
        self._reads = {
            node: read
            for node in self._captured.graph.nodes
            if (read := _read_by(node)) is not None
        }
        self._reader = self._module() if self._reads else None
        self.reads = () if self._reader is None else used_inputs(self._reader.graph)

    def __bool__(self) -> bool:
        return bool(self._reads)

    def read(self, inputs: Sequence[Any]) -> tuple[Number, ...]:
        """The numbers that a call with these inputs reads; it waits for the device.

        Raises:
            UnsupportedModelError: an input has no values (it is on the device "meta").
        """
        if self._reader is None:
            return ()
        try:
            with torch.no_grad():
                found = _run(self._reader, inputs)
        except (RuntimeError, NotImplementedError) as error:
            lines = ", ".join(dict.fromkeys(map(user_line, self._reads)))
            raise UnsupportedModelError(
                f"the model reads a number out of a tensor ({lines}), which failed ({error}); "
                'give inputs that have values: none on the device "meta"'
            ) from error
        # NaN equals nothing, itself included.
        return tuple("nan" if _is_nan(number) else number for number in found)

    def fixed(self, numbers: Sequence[Number]) -> fx.GraphModule:
        """The graph for calls that read these numbers."""
        if not self._reads:
            return self._captured
        module = fx.GraphModule(self._captured, copy.deepcopy(self._captured.graph))
        module.meta = self._captured.meta
        by_name = {node.name: node for node in module.graph.nodes}
        for node, number in zip(self._reads, numbers, strict=True):
            _fix(by_name[node.name], self._reads[node], float("nan") if number == "nan" else number)
        sources = [by_name[read.source.name] for read in self._reads.values()]
        spare = ancestors(sources) | {by_name[node.name] for node in self._reads}
        for node in reversed(module.graph.nodes):
            # What Dynamo asserts of sizes goes too: where it does not hold, tracing fails.
            asserts = node.target is aten._assert_scalar.default
            is_number = isinstance(node.meta.get("example_value"), _NUMBERS)
            if asserts or ((is_number or node in spare) and _is_spare(node)):
                module.graph.erase_node(node)
        module.recompile()
        return module

    def refuse_changing(self, graph: fx.Graph) -> None:
        """Refuse numbers that depend on what changes at every step.

        ``graph`` has the roles of the inputs, which are those of Dynamo's graph.

        Raises:
            UnsupportedModelError: a number depends on the latents or on the timestep.
        """
        given = self._captured.graph.find_nodes(op="placeholder")
        roles = [node.meta["role"] for node in graph.find_nodes(op="placeholder")]
        changing = {
            node: role
            for node, role in zip(given, roles, strict=True)
            if role in ("latents", "timestep", "other timestep")
        }
        for node, read in self._reads.items():
            for source in sorted(ancestors([read.source]) & changing.keys(), key=str):
                raise UnsupportedModelError(
                    f"the model reads a number out of the {changing[source]} at {user_line(node)}: "
                    "it is another one at every step, and each would need a graph of its own; keep "
                    "it a tensor (and pass floats as tensors)"
                )

    def _module(self) -> fx.GraphModule:
        """A module that returns the numbers, and computes nothing else.

        It has the regions of autocast as the model has them, up to the last number.
        """
        needed = ancestors([read.source for read in self._reads.values()])
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        numbers: list[Any] = []
        for node in self._captured.graph.nodes:
            in_time = len(numbers) < len(self._reads)
            is_region = node.target in (enter_autocast, exit_autocast) and in_time
            if node.op == "placeholder" or node in needed or is_region:
                copies[node] = graph.node_copy(node, copies.__getitem__)
            if node in self._reads:
                read = self._reads[node]
                numbers.append(graph.call_function(read.number, (copies[read.source],)))
        graph.output(numbers)
        return fx.GraphModule(self._captured, graph)


def _run(reader: fx.GraphModule, inputs: Sequence[Any]) -> list[Number]:
    """What ``reader`` returns; no region stays open."""
    if not reader.graph.find_nodes(op="call_function", target=enter_autocast):
        found: list[Number] = reader(*inputs)
        return found
    running = fx.Interpreter(reader)
    running.extra_traceback = False  # says where in our own code
    try:
        found = running.run(*inputs)
    finally:
        for node, region in reversed(running.env.items()):
            if node.target is enter_autocast:
                exit_autocast(region)  # type: ignore[no-untyped-call]
    return found


def _is_nan(number: Number) -> bool:
    return isinstance(number, float) and math.isnan(number)


def _read_by(node: fx.Node) -> _Read | None:
    """The number that a node of Dynamo's graph reads; None if it reads none."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    args: Sequence[Any] = node.args
    if not args or not isinstance(args[0], fx.Node):
        return None
    if name in ("item", "_local_scalar_dense.default"):
        return _Read(args[0], _item)
    if not node.meta.get("unbacked_bindings"):
        return None
    if name == "masked_select":
        mask = args[1] if len(args) > 1 else node.kwargs["mask"]
        return _Read(mask, _count, _masked_select) if isinstance(mask, fx.Node) else None
    if name in ("nonzero", "argwhere") or (name == "where" and len(args) == 1):
        return _Read(args[0], _count, _where if name == "where" else _nonzero)
    if name == "getitem":
        masks = [mask for mask in _indices(args[1]) if _is_boolean(mask)]
        return _Read(masks[0], _count, _select) if len(masks) == 1 else None
    if name == "repeat_interleave":
        repeats = args[1] if len(args) > 1 else node.kwargs.get("repeats", args[0])
        return _Read(repeats, _total, _repeat) if isinstance(repeats, fx.Node) else None
    return None


def _indices(index: Any) -> tuple[Any, ...]:
    return tuple(index) if isinstance(index, (tuple, list)) else (index,)


def _is_boolean(index: Any) -> bool:
    value = index.meta.get("example_value") if isinstance(index, fx.Node) else index
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _item(source: Tensor) -> Number:
    return source.item()


def _count(mask: Tensor) -> int:
    return int(mask.count_nonzero())


def _total(repeats: Tensor) -> int:
    return int(repeats.sum())


def _fix(node: fx.Node, read: _Read, number: Number) -> None:
    """Let ``node`` be what it is for ``number``."""
    if read.fixed is not None:
        with node.graph.inserting_before(node):
            args = (number, *node.args)
            new = node.graph.call_function(read.fixed, args, node.kwargs)
        new.meta = {key: kept for key, kept in node.meta.items() if key != "unbacked_bindings"}
        node.replace_all_uses_with(new)
        return
    put_value(node, number)


def _is_spare(node: fx.Node) -> bool:
    """Whether a node is not read any more, and does no more than to return something."""
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    writes = name.endswith("_") or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    calls = node.op in ("call_function", "call_method")
    return calls and not node.users and not writes and not node.is_impure()


def _places(mask: Tensor, count: int) -> Tensor:
    """Where ``mask`` is true, or not 0, as it lies in memory: [count], in order."""
    return (mask == 0).flatten().to(torch.uint8).argsort(stable=True)[:count]


def _coordinates(mask: Tensor, count: int) -> Iterator[Tensor]:
    """The same along each axis of ``mask``."""
    places = _places(mask, count)
    for axis, size in enumerate(mask.shape):
        behind = math.prod(mask.shape[axis + 1 :])
        yield places // behind % size


def _masked_select(count: int, tensor: Tensor, mask: Tensor) -> Tensor:
    # An axis of one at the end of the mask takes or leaves all of it: whole rows are taken.
    shape = torch.broadcast_shapes(tensor.shape, mask.shape)  # type: ignore[no-untyped-call]
    sizes = (1,) * (len(shape) - mask.dim()) + tuple(mask.shape)
    ahead = max((at + 1 for at, size in enumerate(sizes) if size == shape[at]), default=0)
    rows = mask.reshape(sizes).expand(*shape[:ahead], *sizes[ahead:])
    taken = count * (rows.numel() // max(1, mask.numel()))
    behind = math.prod(shape[ahead:])
    flat = tensor.expand(shape).reshape(-1, behind)
    return flat.index_select(0, _places(rows, taken)).flatten()


def _nonzero(count: int, tensor: Tensor, *, as_tuple: bool = False) -> Any:
    coordinates = tuple(_coordinates(tensor, count))
    return coordinates if as_tuple else torch.stack(coordinates, dim=1)


def _where(count: int, condition: Tensor) -> tuple[Tensor, ...]:
    return tuple(_coordinates(condition, count))


def _select(count: int, tensor: Tensor, index: Any) -> Tensor:
    found: list[Any] = []
    for part in _indices(index):
        mask = isinstance(part, Tensor) and part.dtype == torch.bool
        found += _coordinates(part, count) if mask else [part]
    return tensor[tuple(found)]


def _repeat(count: int, *args: Any, **kwargs: Any) -> Tensor:
    return torch.repeat_interleave(*args, **{**kwargs, "output_size": count})
