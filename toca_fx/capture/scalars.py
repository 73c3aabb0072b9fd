"""Python numbers that vary from call to call, such as the scale of a LoRA, as inputs of the graph.

From its second value on Dynamo captures such a number as a symbol, and what is made of it as Python
arithmetic between the nodes. That arithmetic is done here ahead of the graph, as Python does it,
and the tensors that are scaled or shifted by its results read those from inputs: one graph serves
all values. A number that is read otherwise (it decides on a size, or is the argument of an
operator) stays where Dynamo has it, for ``numbers`` to fix.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.capture.sources import input_sources, is_of_shape, is_python_float, name_inputs
from toca_fx.graph.edit import ancestors
from toca_fx.graph.roles import state_name
from toca_fx.torch_private import FakeTensor

# What scales or shifts a tensor, by the name of the function or method.
_SHIFTS = frozenset({"add", "sub"})
_ARITHMETIC = _SHIFTS | frozenset({"mul", "multiply", "div", "truediv", "true_divide"})
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_MANY = 4096  # values

_Key = tuple[fx.Node, torch.dtype, torch.device]


class Scalars:
    """Dynamo's graph ``captured`` as ``graph``, what its calls are given and what they return.

    The inputs of ``graph`` are those of ``captured`` that it reads, then the numbers: tensors [] in
    the dtype that they are computed with. A value has the same tensor at every call, so that who
    compares inputs sees it change. Dynamo has to be capturing right now.
    """

    def __init__(self, captured: fx.GraphModule) -> None:
        self.graph = captured
        self._host: fx.GraphModule | None = None
        numbers = _numbers(captured)
        if not numbers:
            return
        self._read: dict[_Key, fx.Node] = {}  # the inputs of ``graph`` that are numbers
        self._returned: dict[int, fx.Node] = {
            at: node.all_input_nodes[0]
            for at, node in enumerate(captured.graph.output_node().args[0])  # type: ignore[arg-type]
            if isinstance(node, fx.Node) and _is_made_a_tensor(node, numbers)
        }
        self.graph = self._without(captured, numbers)
        read = [number for number, _, _ in self._read]
        self._host = _host(captured, [*read, *self._returned.values()])

    def examples(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Inputs of ``graph`` in a capture: numbers are symbols there, and must not be read."""
        if self._host is None:
            return inputs
        numbers = [node.meta["example_value"] for node in self._read.values()]
        return [*(inputs[at] for at in self._kept), *numbers]

    def given(self, inputs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """The inputs of ``graph`` for those of ``captured``, and the numbers for ``returned``."""
        if self._host is None:
            return inputs, ()
        numbers = self._host(*inputs)
        values = zip(numbers, self._read, strict=False)
        read = [_tensor_of(number, dtype, device) for number, (_, dtype, device) in values]
        kept = [
            _tensor_of(inputs[at].item(), torch.float64, inputs[at].device)
            if at in self._floats
            else inputs[at]
            for at in self._kept
        ]
        return [*kept, *read], numbers[len(read) :]

    def returned(self, outputs: Any, numbers: Sequence[Any]) -> Any:
        """What ``captured`` returns, where ``graph`` returns ``outputs``."""
        if not numbers:
            return outputs
        whole = list(outputs)
        for at, number in zip(self._returned, numbers, strict=True):
            whole.insert(at, torch.scalar_tensor(number, dtype=torch.float64))
        return whole

    def _without(self, captured: fx.GraphModule, numbers: Set[fx.Node]) -> fx.GraphModule:
        """A copy of ``captured`` that reads ``numbers`` from inputs, where it can."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        outputs: Any = graph.graph_copy(captured.graph, copies)
        graph.output(tuple(each for at, each in enumerate(outputs) if at not in self._returned))
        self._scale_by_inputs(captured.graph, numbers, copies)
        for node in reversed(captured.graph.nodes):
            spare = node in numbers or _is_made_a_tensor(node, numbers)
            if spare and node.op != "placeholder" and not copies[node].users:
                graph.erase_node(copies[node])
        inputs = captured.graph.find_nodes(op="placeholder")
        sources = input_sources(captured)
        names = []
        self._kept, self._floats = list[int](), set[int]()
        for at, node in enumerate(inputs):
            if not copies[node].users and (node in numbers or is_python_float(node)):
                graph.erase_node(copies[node])
                continue
            self._kept.append(at)
            if is_python_float(node):
                self._floats.add(at)
            names.append(state_name(sources, node.name) if at in self._floats else sources[at])
        names += [state_name(sources, node.name) for node in self._read.values()]
        module = fx.GraphModule(captured, graph)
        module.meta = dict(captured.meta)
        name_inputs(module, names)
        return module

    def _scale_by_inputs(
        self, captured: fx.Graph, numbers: Set[fx.Node], copies: dict[fx.Node, fx.Node]
    ) -> None:
        """Let the ``copies`` of what is scaled or shifted by ``numbers`` read inputs."""
        first = next(copies[node] for node in captured.nodes if node.op != "placeholder")
        for node in captured.nodes:
            number = _scaled_by(node, numbers)
            if number is None:
                continue
            value = node.meta["example_value"]
            # As torch computes with a Python number: narrow dtypes in float32.
            dtype = torch.float32 if value.dtype.itemsize < 4 else value.dtype
            key = (number, dtype, value.device)
            if key not in self._read:
                with first.graph.inserting_before(first):
                    made = first.graph.placeholder(f"number_{len(self._read)}")
                with value.fake_mode:
                    made.meta["example_value"] = torch.empty((), dtype=dtype, device=value.device)
                self._read[key] = made
            _scale(copies[node], copies[number], self._read[key], dtype)


_known: dict[Hashable, Tensor] = {}


def _tensor_of(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor [] of a number; numbers that are equal once they are rounded have the same one."""
    key = (repr(number), dtype, device)
    found = _known.get(key)
    if found is None:
        with torch.inference_mode(False):
            made = torch.tensor(number, dtype=dtype, device=device)
        if len(_known) > _MANY:  # a step that finds another tensor is a full one
            _known.clear()
        found = _known.setdefault((repr(made.item()), dtype, device), made)
        _known[key] = found
    return found


def _numbers(captured: fx.GraphModule) -> set[fx.Node]:
    """The nodes that are numbers, made of Python numbers that vary and of nothing else."""
    found, floats = set[fx.Node](), set[fx.Node]()
    inputs = captured.graph.find_nodes(op="placeholder")
    for node, source in zip(inputs, input_sources(captured), strict=True):
        if is_python_float(node):
            floats.add(node)
        elif _is_number(node) and source and not is_of_shape(source):
            found.add(node)
    for node in captured.graph.nodes:
        operands = node.all_input_nodes
        if (
            operands
            and _is_number(node)
            and all(each in found or each in floats for each in operands)
        ):
            found.add(node)
    return found


def _is_number(node: fx.Node) -> bool:
    return node.op != "output" and isinstance(node.meta.get("example_value"), _NUMBERS)


def _is_made_a_tensor(node: fx.Node, numbers: Set[fx.Node]) -> bool:
    """Whether a node is what Dynamo returns for one of ``numbers``."""
    return node.target is torch.scalar_tensor and set(node.all_input_nodes) <= numbers


def _scaled_by(node: fx.Node, numbers: Set[fx.Node]) -> fx.Node | None:
    """The one of ``numbers`` that ``node`` scales or shifts a tensor by; None if it does not."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    value, operands = node.meta.get("example_value"), node.all_input_nodes
    found = [each for each in operands if each in numbers]
    if name not in _ARITHMETIC or len(node.args) != 2 or node.kwargs or node in numbers:
        return None
    if len(found) != 1 or len(operands) != 2 or type(value) is not FakeTensor:
        return None
    # What is added to narrow dtypes torch rounds in ways of its own.
    exact = value.is_floating_point() and (value.dtype.itemsize >= 4 or name not in _SHIFTS)
    return found[0] if exact else None


def _scale(node: fx.Node, number: fx.Node, given: fx.Node, dtype: torch.dtype) -> None:
    """Let ``node`` scale by ``given`` and not by ``number``, in ``dtype``."""
    graph, value = node.graph, node.meta["example_value"]
    (tensor,) = (each for each in node.all_input_nodes if each is not number)

    def put(target: str, operand: fx.Node, *args: Any) -> fx.Node:
        with graph.inserting_before(node):
            made = graph.call_method(target, (operand, *args))
        with operand.meta["example_value"].fake_mode:
            example = getattr(operand.meta["example_value"], target)(*args)
        made.meta = {**node.meta, "example_value": example}
        return made

    operand = tensor
    if node.target is operator.truediv and node.args[0] is number:  # as torch does it
        operand = put("reciprocal", operand)
        node.target, node.args = operator.mul, (number, tensor)
    if operand.meta["example_value"].dtype != dtype:
        operand = put("to", operand, dtype)
    replaced = {number: given, tensor: operand}
    node.args = fx.node.map_arg(node.args, lambda each: replaced.get(each, each))
    if value.dtype == dtype:
        return
    users = list(node.users)
    with graph.inserting_after(node):
        result = graph.call_method("to", (node, value.dtype))
    for user in users:
        user.replace_input_with(node, result)
    result.meta = dict(node.meta)
    with value.fake_mode:
        node.meta["example_value"] = value.to(dtype)


def _host(captured: fx.GraphModule, numbers: Sequence[fx.Node]) -> fx.GraphModule:
    """A module that computes ``numbers`` for the inputs of ``captured``, and nothing else."""
    needed, graph = ancestors(numbers), fx.Graph()
    copies = dict[fx.Node, fx.Node]()
    for node in captured.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[number] for number in numbers])
    return fx.GraphModule(captured, graph)
