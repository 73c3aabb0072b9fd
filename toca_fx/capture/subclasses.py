"""Tensors of classes of their own (quantised weights, DTensor) enter graphs as plain tensors.

A *wrapper* holds other tensors, and says which (``__tensor_flatten__``): torchao, optimum-quanto,
DTensor. Each of these becomes an input, and the graph begins by putting wrappers together; what is
traced of it is what the class does with what it holds. Any other class is plain data with methods
(GGUF, bitsandbytes), of which Dynamo's graph has what they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from toca_fx.capture.sources import input_sources, model_class, name_inputs
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.graph import roles
from toca_fx.torch_private import (
    DisableTorchFunctionSubclass,
    EnableTorchFunction,
    is_opaque,
    is_wrapper,
    tree_leaves,
)


@dataclass(frozen=True)
class Wrapper:
    """How a wrapper is put together of the tensors in it: the target of a node that does so.

    ``parts`` are the attributes that hold them, with the ``Wrapper`` of what is a wrapper again,
    and ``others`` those that hold something else (a mesh of devices). ``context``, what the class
    has to know beside them, is compared by ``says``, its text.
    """

    __name__ = "wrapper"  # for generated code

    kind: type[Tensor]
    parts: tuple[tuple[str, Wrapper | None], ...]
    says: str
    shape: torch.Size
    stride: tuple[int, ...]
    context: Any = field(compare=False, repr=False)
    others: Mapping[str, Any] = field(compare=False, repr=False)

    @classmethod
    def of(cls, value: Any) -> Wrapper | None:
        """How ``value`` is put together; None if it is no wrapper."""
        kind: Any = type(value)
        if not is_wrapper(value):
            return None
        names, context = value.__tensor_flatten__()
        held = {name: getattr(value, name) for name in names}
        others = {name: one for name, one in held.items() if not isinstance(one, Tensor)}
        parts = tuple((name, cls.of(held[name])) for name in names if name not in others)
        says = repr((context, others))
        return cls(kind, parts, says, value.shape, value.stride(), context, others)

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes that the tensors are found by: ``scale``, ``packed.data``."""
        return tuple(
            f"{name}.{deeper}" if deeper else name
            for name, inner in self.parts
            for deeper in (inner.names if inner else ("",))
        )

    def tensors(self, value: Any) -> Iterator[Tensor]:
        """The plain tensors in ``value``, a wrapper that is put together alike."""
        for name, inner in self.parts:
            held = getattr(value, name)
            yield from inner.tensors(held) if inner else (held,)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """The wrapper of ``tensors``."""
        return self.put(iter(tensors))

    def put(self, tensors: Iterator[Tensor]) -> Tensor:
        """The wrapper of the next of ``tensors``."""
        held = {name: inner.put(tensors) if inner else next(tensors) for name, inner in self.parts}
        made: Tensor = self.kind.__tensor_unflatten__(  # type: ignore[attr-defined]
            {**self.others, **held}, self.context, self.shape, self.stride
        )
        return made


class Unwrapping:
    """The inputs of a call, with the tensors in wrappers in the place of these.

    ``outer`` has the position, among the inputs of a call, of each that comes out.
    """

    def __init__(self, wrappers: Sequence[Wrapper | None]) -> None:
        self._wrappers = {at: wrapper for at, wrapper in enumerate(wrappers) if wrapper}
        counts = (1 if each is None else len(each.names) for each in wrappers)
        self.outer = tuple(at for at, count in enumerate(counts) for _ in range(count))

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The inputs without wrappers; ``inputs`` themselves if there is none."""
        if not self._wrappers:
            return inputs
        found: list[Any] = []
        for at, value in enumerate(inputs):
            wrapper = self._wrappers.get(at)
            found += (value,) if wrapper is None else wrapper.tensors(value)
        return found


class Holder(NamedTuple):
    """A ``module`` that has a tensor that wraps others, of the class ``kind``, as ``name``."""

    path: str
    module: nn.Module
    name: str
    kind: str


def holders_of(model: nn.Module) -> Iterator[Holder]:
    """Of each class of modules the first that has a tensor of each class that wraps others."""
    known = set[tuple[type, type]]()
    for path, module in model.named_modules():
        for name, value in chain(
            module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        ):
            kind = type(value)
            if is_wrapper(value) and (type(module), kind) not in known:
                known.add((type(module), kind))
                yield Holder(path, module, name, f"{kind.__module__}.{kind.__qualname__}")


def refuse_opaque(model: nn.Module) -> None:
    """Refuse parameters and buffers of classes that make their own of calls, and do not say how.

    Raises:
        UnsupportedModelError: there is one.
    """
    for name, value in chain(model.named_parameters(), model.named_buffers()):
        kind = type(value)
        if is_opaque(value):
            raise UnsupportedModelError(
                f"{name} is a {kind.__module__}.{kind.__qualname__}: a tensor that makes its own "
                "of every call, and does not say of which tensors it is made; give its class "
                "__tensor_flatten__ and __tensor_unflatten__, or let the module hold plain tensors"
            )


def as_plain() -> AbstractContextManager[Any]:
    """Inside, tensors of classes of their own act as plain ones, and results are plain."""
    return DisableTorchFunctionSubclass()


def as_themselves() -> AbstractContextManager[Any]:
    """Inside, tensors of classes of their own act as such again: graphs are traced of that."""
    return EnableTorchFunction()


def unwrapped(captured: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, Unwrapping]:
    """Dynamo's graph for inputs without wrappers, and how to make such inputs of those of a call.

    It is ``captured`` itself if no input is a wrapper, else a copy.

    Raises:
        UnsupportedModelError: a wrapper is no parameter or buffer, or is returned.
    """
    wrappers = [Wrapper.of(value) for value in inputs]
    unwrapping = Unwrapping(wrappers)
    if not any(wrappers):
        return captured, unwrapping
    sources = input_sources(captured)
    model = roles.model_name(sources)
    named: list[str] = []
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    held: dict[fx.Node, tuple[Wrapper, list[fx.Node]]] = {}
    placeholders = captured.graph.find_nodes(op="placeholder")
    for node, wrapper, source, value in zip(placeholders, wrappers, sources, inputs, strict=True):
        if wrapper is None:
            copies[node] = graph.node_copy(node)
            named.append(source)
            continue
        if not roles.is_state(source, value, model):
            raise UnsupportedModelError(
                f"{model_class() or 'the model'} is given a {wrapper.kind.__name__} ({source}): "
                "only parameters and buffers may be tensors that wrap others. Give it a plain "
                "tensor; what quantises weights at each call has to be frozen (quanto.freeze)"
            )
        held[node] = wrapper, _inputs_for(node, wrapper, graph)
        named += (f"{source}.{name}" for name in wrapper.names)
    for node, (wrapper, tensors) in held.items():
        made = graph.create_node("call_function", wrapper, tuple(tensors), {}, node.name)
        made.meta["example_value"] = node.meta["example_value"]
        copies[node] = made
    for node in captured.graph.nodes:
        if node.op == "output":
            _refuse_returned(node)
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    module = fx.GraphModule(captured, graph)
    module.meta = dict(captured.meta)
    name_inputs(module, named)
    return module, unwrapping


def _inputs_for(node: fx.Node, wrapper: Wrapper, graph: fx.Graph) -> list[fx.Node]:
    """Inputs of ``graph`` for the tensors in a wrapper, which is the input ``node``."""
    made = []
    value = node.meta["example_value"]
    for name, inner in zip(wrapper.names, wrapper.tensors(value), strict=True):
        made.append(graph.placeholder(f"{node.name}_{name.replace('.', '_')}"))
        made[-1].meta["example_value"] = inner
    return made


def _refuse_returned(output: fx.Node) -> None:
    for node in output.all_input_nodes:
        for value in tree_leaves(node.meta.get("example_value")):
            if is_wrapper(value):
                raise UnsupportedModelError(
                    f"the model returns a {type(value).__name__}, a tensor that wraps others; let "
                    "it return a plain tensor"
                )
