"""Code that a graph has as a module of its own, put where it is called.

``torch.utils.checkpoint`` and ``torch.compiler.nested_compile_region`` reach a backend as one
operator that is given the code, which says something to autograd and compilers, and nothing about
what is computed.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx

from toca_fx.capture.sources import clean_path, input_sources
from toca_fx.graph.roles import model_name
from toca_fx.torch_private import HigherOrderOperator

Arguments = tuple[Any, ...]
Modules = Mapping[str, Sequence[Any]]  # a stack as Dynamo has it: key -> (name, class)

# The arguments of the code, out of those of the operator that is given it first.
_WRAPPERS: dict[str, Callable[[Arguments], Sequence[Any]]] = {
    "tag_activation_checkpoint": lambda args: args[1:],
    "wrap": lambda args: args[1:],
    "wrap_activation_checkpoint": lambda args: args[1:],
    "invoke_subgraph": lambda args: args[2:],  # behind a name
    "hints_wrapper": lambda args: [*args[1], *args[2].values()],
}
_ATTRIBUTE = re.compile("_(?:parameters|buffers)_")


def inlined(captured: fx.GraphModule) -> fx.GraphModule:
    """Dynamo's graph without wrapped code; ``captured`` itself if it has none, else a copy."""
    if not any(map(_is_wrapper, captured.graph.nodes)):
        return captured
    return _inlined(captured, model_name(input_sources(captured)))


def _inlined(captured: fx.GraphModule, model: str) -> fx.GraphModule:
    module = fx.GraphModule(captured, copy.deepcopy(captured.graph))
    module.meta = captured.meta
    first: dict[object, Modules] = {}
    for node in list(module.graph.nodes):
        if _is_wrapper(node):
            around = node.meta.get("nn_module_stack", {})
            code: Any = node.args[0]
            _put_in_place(node, module, model, first.setdefault(code.target, around))
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return module


def given_code(node: fx.Node) -> bool:
    """Whether a node is an operator that is given code (``torch.cond``, say)."""
    return isinstance(node.target, HigherOrderOperator)


def codes_of(node: fx.Node) -> Iterator[fx.GraphModule]:
    """The code that an operator is given; none if it is given none."""
    owner = node.graph.owning_module
    if owner is None or not given_code(node):
        return
    for operand in node.all_input_nodes:
        code = getattr(owner, str(operand.target), None) if operand.op == "get_attr" else None
        if isinstance(code, fx.GraphModule):
            yield code


def _is_wrapper(node: fx.Node) -> bool:
    return given_code(node) and str(node.target) in _WRAPPERS


def _put_in_place(call: fx.Node, owner: fx.GraphModule, model: str, first: Modules) -> None:
    """Put a copy of the code that ``call`` is given in its place.

    ``first`` are the modules around the call that the code was captured from.
    """
    reference: Any = call.args[0]
    code: Any = owner.get_submodule(reference.target)
    body = _inlined(code, model)
    given = _WRAPPERS[str(call.target)](call.args)
    parameters = body.graph.find_nodes(op="placeholder")
    values = dict(zip(parameters, given, strict=True))
    renamed = _renamed(parameters, given)
    outer = call.meta.get("nn_module_stack", {})
    with call.graph.inserting_before(call):
        returned: Any = call.graph.graph_copy(body.graph, values)
    for node, put in values.items():
        if node.op != "placeholder" and isinstance(put, fx.Node):
            own = {
                key: (_rename(path, renamed, model), *others)
                for key, (path, *others) in node.meta.get("nn_module_stack", {}).items()
            }
            put.meta["nn_module_stack"] = {
                **outer,
                # Another call of the code is another call of the modules in it.
                **{f"{key}@{call.name}": own[key] for key in _inside(own, outer, first)},
            }
    if isinstance(returned, fx.Node):
        call.replace_all_uses_with(returned)
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise AssertionError(f"{user} reads all of {call}, of which Dynamo reads parts")
        user.replace_all_uses_with(returned[user.args[1]])
        call.graph.erase_node(user)
    call.graph.erase_node(call)


def _inside(own: Modules, outer: Modules, first: Modules) -> list[str]:
    """The modules that are called in the code, by key; ``own`` may begin with those around it.

    Those are the ones around the ``first`` call, or what they have become: ``outer``.
    """
    depth = 0
    for (key, (path, *_)), (around, (other, *_)), known in zip(
        own.items(), outer.items(), first, strict=False
    ):
        if key not in (around, known) and path != other:
            break
        depth += 1
    return list(own)[depth:]


def _renamed(parameters: Sequence[fx.Node], given: Sequence[Any]) -> dict[str, str]:
    """The modules of a call by those that the code was captured from.

    Equal blocks may have one code, that of the first. Inputs have the names of their modules.
    """
    renamed: dict[str, str] = {}
    for parameter, value in zip(parameters, given, strict=True):
        own, called = _module_of(parameter.name), _module_of(getattr(value, "name", ""))
        if len(own) == len(called):
            for depth in range(1, len(own) + 1):
                renamed[".".join(own[:depth])] = ".".join(called[:depth])
    return renamed


def _module_of(name: str) -> Sequence[str]:
    """``l_self_modules_blocks_modules_0_parameters_weight_`` -> ("blocks", "0")."""
    *modules, last = name.split("_modules_")[1:] or [""]
    last = _ATTRIBUTE.split(last)[0]
    return (*modules, last) if last else ()


def _rename(path: str, renamed: Mapping[str, str], model: str) -> str:
    clean = clean_path(path, model)
    is_other = model and renamed.get(clean, clean) != clean
    return f"{model}.{renamed[clean]}" if is_other else path
