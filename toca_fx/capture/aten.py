"""Dynamo's graph, re-traced to pre-dispatch ATen with clean module paths.

Pre-dispatch ATen is one small vocabulary (``aten.linear``, ``aten.scaled_dot_product_attention``,
...) that is the same on every device; graphs taken after AOTAutograd have attention already
lowered, differently per device.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from toca_fx.capture.functionalize import is_mutable, make_functional
from toca_fx.diagnostics import UnsupportedModelError

aten = torch.ops.aten

# "L['self'].__dict__['_modules']['blocks'].0.attn" and "L['self']._modules['blocks']._modules['0']"
# -> blocks.0.attn
_PATH_TOKEN = re.compile(r"\['?([^'\]]+)'?\]|([A-Za-z0-9_]+)")
_PATH_NOISE = frozenset(
    {"L", "G", "self", "__dict__", "_modules", "_orig_mod", "_call_impl", "forward", "fn"}
)


_SOURCES = "toca_fx_input_sources"

# These decompose into bmm and views by themselves, so that attention has fewer spellings.
_DECOMPOSED: dict[Any, Any] = {aten.einsum.default: aten.einsum.default.decompose}


def to_aten(captured: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Re-trace Dynamo's graph to pre-dispatch ATen for the shapes of ``inputs``, which are not
    modified.

    Placeholders keep their order. Every node carries ``meta["val"]`` (fake tensors with concrete
    shapes) and ``meta["path"]`` (the module path such as ``transformer_blocks.3.ff``, "" outside
    any submodule). The module's ``meta["writes"]`` tells whether the model writes to tensors in
    place, which the graph that is returned does not.

    Raises:
        UnsupportedModelError: the model writes to memory of the caller in place, or a number
            depends on a tensor's values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [
        mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value
        for value in inputs
    ]
    interpret = fx.Interpreter(captured).run
    retrace = make_fx(
        interpret, tracing_mode="fake", pre_dispatch=True, decomposition_table=_DECOMPOSED
    )
    try:
        with preserve_node_meta():
            graph_module = retrace(*fakes)
    except DataDependentOutputException as error:
        raise UnsupportedModelError(
            f"the graph reads a number out of a tensor ({error.func}): a Python float changes from call to call, or the model "
            "was compiled with dynamic=True. Pass floats as tensors and leave dynamic out; or, for a number that changes between "
            "generations only (the scale of a LoRA), set torch._dynamo.config.specialize_float = True"
        ) from error
    graph_module.meta["writes"] = False
    for node in list(graph_module.graph.nodes):
        stack = [clean_path(entry[0]) for entry in node.meta.get("nn_module_stack", {}).values()]
        node.meta["stack"] = tuple(path for path in stack if path)
        node.meta["path"] = stack[-1] if stack else ""
        nothing = node.target is aten.detach_.default
        nothing |= node.target is aten.dropout.default and (node.args[1] == 0 or not node.args[2])
        if is_mutable(node) and not nothing:
            graph_module.meta["writes"] = True
            make_functional(node)
        elif nothing:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    sources = input_sources(captured)
    _mark_constants(graph_module.graph, [is_model_state(source) for source in sources], inputs)
    _mark_roles(graph_module.graph, sources)
    graph_module.recompile()
    return graph_module


def timestep_position(sources: Sequence[str], inputs: Sequence[Any]) -> int | None:
    """The input that holds the timestep, by the name of the forward's argument or else by its
    shape; None if none can be told.
    """
    for name in ("timestep", "timesteps", "t", "sigma", "time"):
        for position, source in enumerate(sources):
            if source.endswith(f"['{name}']") and isinstance(inputs[position], Tensor):
                return position
    # Else the one input that has a number for each sample, or for all of them.
    candidates = [
        position
        for position, (source, value) in enumerate(zip(sources, inputs, strict=True))
        if source
        and not is_model_state(source)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() <= 1
    ]
    return candidates[0] if len(candidates) == 1 else None


def _mark_roles(graph: fx.Graph, sources: Sequence[str]) -> None:
    """Set ``meta["role"]`` of the inputs: "state", "timestep", "latents" (what the model returns is
    shaped like them) or "condition".
    """
    nodes = graph.find_nodes(op="placeholder")
    values = [node.meta.get("val") for node in nodes]
    for node in nodes:
        node.meta["role"] = "state" if node.meta["constant"] else "condition"
    timestep = timestep_position(sources, values)
    if timestep is not None:
        nodes[timestep].meta["role"] = "timestep"
    (returned,) = graph.find_nodes(op="output")
    shapes = [
        node.meta["val"].shape
        for node in returned.all_input_nodes
        if isinstance(node.meta.get("val"), Tensor)
    ]
    inputs = [
        node
        for node in nodes
        if node.meta["role"] == "condition" and node.meta["val"].is_floating_point()
    ]
    for shape in shapes:
        alike = [node for node in inputs if node.meta["val"].dim() == len(shape)]
        # The output may have other channels than the latents: a variance as well, or none of a
        # condition that came with them.
        alike.sort(
            key=lambda node: sum(a != b for a, b in zip(node.meta["val"].shape, shape, strict=True))
        )
        for node in alike[:1]:
            node.meta["role"] = "latents"


def _mark_constants(graph: fx.Graph, of_model: Sequence[bool], inputs: Sequence[Any]) -> None:
    """Set ``meta["constant"]``: whether a node depends on parameters, buffers and numbers only."""
    placeholders = iter(zip(of_model, inputs, strict=True))
    for node in graph.nodes:
        if node.op == "placeholder":
            state, value = next(placeholders)
            node.meta["constant"] = (
                state or isinstance(value, torch.nn.Parameter) or not isinstance(value, Tensor)
            )
        else:
            node.meta["constant"] = node.op != "output" and all(
                operand.meta["constant"] for operand in node.all_input_nodes
            )


def clean_path(source: str) -> str:
    """The module path inside Dynamo's name for it: ``blocks.0.attn`` for
    ``L['self']._modules['blocks'].0.attn``.
    """
    tokens = (quoted or plain for quoted, plain in _PATH_TOKEN.findall(source))
    return ".".join(token for token in tokens if token not in _PATH_NOISE)


def model_class() -> str:
    """The class name of the model that Dynamo is capturing right now, "" if it captures no method
    or nothing at all.
    """
    try:
        frame = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return ""
    owner = frame.f_locals.get("self") if frame is not None else None
    return type(owner).__name__ if isinstance(owner, torch.nn.Module) else ""


def input_sources(captured: fx.GraphModule) -> tuple[str, ...]:
    """Per placeholder of Dynamo's graph, the name of the argument or parameter it comes from ("" if
    unknown).

    Dynamo forgets them when it has compiled: the first call has to be made in the backend, and
    later ones tell the same.
    """
    if _SOURCES not in captured.meta:
        captured.meta[_SOURCES] = tuple(
            _source(node) for node in captured.graph.find_nodes(op="placeholder")
        )
    found: tuple[str, ...] = captured.meta[_SOURCES]
    return found


def _source(placeholder: fx.Node) -> str:
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    # A method up to some release of PyTorch, a property since.
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def is_model_state(source: str) -> bool:
    """Whether an input of that name is an attribute of the model: a parameter or a buffer."""
    return (
        source.startswith("L['self']")
        or "_modules[" in source
        or "_buffers[" in source
        or "_parameters[" in source
    )


def verify(captured: fx.GraphModule, aten: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Run both graphs on the first real inputs and compare.

    For models that write in place: whether a write was followed to all that see it is not certain
    where tensors share memory.

    Raises:
        UnsupportedModelError: the outputs differ by more than rounding.
    """
    expected, actual = (_run_seeded(module, inputs) for module in (captured, aten))
    for left, right in zip(_tensors(expected), _tensors(actual), strict=True):
        scale = left.abs().amax().item() if left.numel() else 0.0
        if not torch.allclose(left, right, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
            error = (left - right).abs().amax().item()
            raise UnsupportedModelError(
                f"the canonical graph differs from the captured one by {error:.1e} (outputs up to {scale:.1e}); the "
                "model probably writes in place through an alias, which cannot be followed"
            )


def _run_seeded(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run with the same random numbers each time (dropped labels in training mode, say), leaving
    the caller's alone.
    """
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return module(*inputs)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
