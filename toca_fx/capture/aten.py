"""Dynamo's graph, re-traced to pre-dispatch ATen with clean module paths.

Pre-dispatch ATen is one small vocabulary (``aten.linear``, ``aten.scaled_dot_product_attention``,
...) that is the same on every device; graphs taken after AOTAutograd have attention already
lowered, differently per device.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.capture import modules
from toca_fx.capture.batches import batched
from toca_fx.capture.casts import bake
from toca_fx.capture.decompositions import DECOMPOSITIONS, take_apart
from toca_fx.capture.functionalize import make_functional
from toca_fx.capture.numbers import Number, Numbers
from toca_fx.capture.retrace import retrace
from toca_fx.capture.sizes import Sizes, Values
from toca_fx.capture.sources import input_sources
from toca_fx.capture.updates import Updates, updates_of, written_buffers
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.graph import roles
from toca_fx.graph.autocast import OFF
from toca_fx.graph.edit import is_check
from toca_fx.torch_private import (
    FakeTensorMode,
    choose_kernels,
    is_mutable,
    is_switch,
    side_effectful,
    storage_id,
)

aten = torch.ops.aten


def to_aten(
    captured: fx.GraphModule,
    inputs: Sequence[Any],
    numbers: Numbers | None = None,
    sizes: Sizes | None = None,
) -> fx.GraphModule:
    """Re-trace Dynamo's graph to pre-dispatch ATen for the shapes of ``inputs``.

    The inputs are not modified. Placeholders keep their order. Every node carries ``meta["val"]``
    (fake tensors with concrete shapes) and ``meta["path"]`` (the module path such as
    ``transformer_blocks.3.ff``, "" outside any submodule). The module's ``meta["writes"]`` says
    whether the model writes to tensors in place, which the returned graph does not; what it writes
    to its buffers is in ``meta["updates"]``. ``meta["sizes"]``, by Dynamo's symbols, and
    ``meta["numbers"]`` are those for which it holds. Regions of autocast, those of the caller too,
    have become casts: the graph is right with autocast off, and without gradients.

    Numbers that the model reads out of tensors are those of ``inputs``. ``numbers`` are where it
    reads them, ``sizes`` its symbols, if they are known.

    Raises:
        WeightsWrittenError: the model writes to its parameters in place.
        UnsupportedModelError: it writes to its inputs in place, a number depends on what changes at
            every step, or a call has an effect that a rewritten graph would lose.
    """
    numbers, sizes = numbers or Numbers(captured), sizes or Sizes(captured)
    return _traced(captured, inputs, numbers, numbers.read(inputs), sizes, sizes.of(inputs))


def to_aten_at(
    captured: fx.GraphModule, known: fx.GraphModule, numbers: Numbers, sizes: Sizes, values: Values
) -> fx.GraphModule:
    """What ``to_aten`` makes for inputs like those that ``known`` was made for, of other sizes.

    No input is needed for that. The numbers that the model reads out of them are the same.
    """
    inputs = [node.meta.get("val") for node in known.graph.find_nodes(op="placeholder")]
    return _traced(captured, inputs, numbers, known.meta["numbers"], sizes, values)


def _traced(
    captured: fx.GraphModule,
    inputs: Sequence[Any],
    numbers: Numbers,
    read: Sequence[Number],
    sizes: Sizes,
    values: Values,
) -> fx.GraphModule:
    mode, fixed = FakeTensorMode(allow_non_fake_inputs=True), numbers.fixed(read)
    if sizes:
        inputs = sizes.examples(inputs, values, mode)
        fixed = sizes.fixed(fixed, values, mode)
    fakes = _fakes(inputs, mode)
    fixed = batched(fixed, fakes)
    _refuse_effects(fixed.graph)
    memory = [_memory(fake) for fake in fakes]
    graph_module = retrace(fixed, fakes, DECOMPOSITIONS)
    _leave_in_place(graph_module.graph, memory)
    sources = input_sources(captured)
    graph_module.meta |= {"writes": False, "sizes": values, "numbers": read}
    returned = graph_module.graph.output_node()
    model, given = roles.model_name(sources), graph_module.graph.find_nodes(op="placeholder")
    for node, source, value in zip(given, sources, inputs, strict=True):
        node.meta["state"] = roles.is_state(source, value, model)
    buffers = written_buffers(graph_module.graph, sources, inputs)
    # Whoever has the model reads its buffers afterwards.
    returned.args = ((returned.args[0], buffers),)
    modules.mark(graph_module.graph, model)
    with OFF.again():
        _clean(graph_module, buffers)
        bake(graph_module.graph)
        take_apart(graph_module.graph)
    outputs, after = returned.args[0]
    returned.args = (outputs,)
    roles.mark(graph_module.graph, sources, inputs)
    graph_module.meta["updates"] = updates_of(graph_module.graph, buffers, after)
    numbers.refuse_changing(graph_module.graph)
    graph_module.recompile()
    return graph_module


def _fakes(inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """Fake tensors like ``inputs``, one for each.

    A tracer knows tensors by identity. Two that are one now (numbers that vary are, while they are
    equal) may be two at another call.
    """
    found: list[Any] = []
    known: set[int] = set()
    for value in inputs:
        fake = value
        if isinstance(value, Tensor):
            fake = mode.from_tensor(value, static_shapes=True)
            fake = fake.detach() if id(fake) in known else fake  # in the same memory
            known.add(id(fake))
        found.append(fake)
    return found


def chooses_kernels(captured: fx.GraphModule) -> bool:
    """Whether the model has a region of ``torch.nn.attention.sdpa_kernel``, which goes."""
    return bool(captured.graph.find_nodes(op="call_function", target=choose_kernels))


def _memory(value: Any) -> object:
    """What two tensors share that are one memory, read alike; None if a value is no tensor."""
    if not isinstance(value, Tensor):
        return None
    return storage_id(value), value.storage_offset(), value.shape, value.stride(), value.dtype


def _leave_in_place(graph: fx.Graph, memory: Sequence[object]) -> None:
    """Remove what gives an input the ``memory`` that it has: bitsandbytes does so at each call."""
    held = dict(zip(graph.find_nodes(op="placeholder"), memory, strict=True))
    for node in graph.find_nodes(op="call_function", target=aten.set_.source_Tensor):
        given, other = held.get(node.args[0]), held.get(node.args[1])
        if given is not None and given == other:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _clean(graph_module: fx.GraphModule, buffers: Collection[fx.Node]) -> None:
    """Remove writes in place and what does nothing.

    Only ``buffers`` may be inputs that are written to.
    """
    for node in list(graph_module.graph.nodes):
        is_identity = node.target is aten.detach_.default or (
            node.target is aten.dropout.default and (node.args[1] == 0 or not node.args[2])
        )
        if is_mutable(node.target) and not is_identity:
            graph_module.meta["writes"] = True
            make_functional(node, buffers)
        elif is_identity:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def _refuse_effects(graph: fx.Graph) -> None:
    """Refuse calls whose effect would get lost; writes, regions and checks are seen to."""
    for node in graph.nodes:
        is_seen_to = node.target is operator.setitem or is_switch(node.target) or is_check(node)
        if node.target in side_effectful and not is_seen_to:
            raise UnsupportedModelError(
                f"the model calls {node.target}, whose effect would get lost where modules are "
                "reused; leave the call out, or compile the part of the model without it"
            )


def verify(captured: fx.GraphModule, aten: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Check that both graphs return the same for the first real inputs.

    It is meant for models that write in place: where tensors share memory, it is not certain that
    all readers of a write were found.

    Raises:
        UnsupportedModelError: the outputs differ by more than rounding.
    """
    updates: Updates = aten.meta["updates"]
    expected = _run_seeded(captured, updates.apart(inputs))
    with OFF.again():
        actual = _run_seeded(aten, updates.apart(inputs))
    for left, right in zip(_tensors(expected), _tensors(actual), strict=True):
        scale = left.abs().amax().item() if left.numel() else 0.0
        if not torch.allclose(left, right, rtol=1e-3, atol=1e-3 * scale, equal_nan=True):
            error = (left - right).abs().amax().item()
            raise UnsupportedModelError(
                f"the canonical graph differs from the captured one by {error:.1e} (outputs up to "
                f"{scale:.1e}); the model probably writes in place through an alias, which cannot "
                "be followed"
            )


def _run_seeded(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run with the same random numbers each time (dropped labels in training mode, say).

    The state of the caller's generator does not change.
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
