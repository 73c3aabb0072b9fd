"""Whether two captures are of one graph: threads that call a model first capture it each.

Dynamo compiles a call for every thread that found nothing compiled, one after the other, and then
hands the calls of all threads to whichever result comes first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from toca_fx.capture.sources import frame_id, input_sources, model_class
from toca_fx.graph.autocast import Autocast
from toca_fx.torch_private import FakeTensor

_PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)


def identity(captured: fx.GraphModule, inputs: Sequence[Any]) -> Hashable | None:
    """A key that is equal for captures of one code, by Dynamo, to one graph, in one state of torch.

    None where that cannot be told. Dynamo has to be capturing right now.
    """
    if any(node.op == "get_attr" for node in captured.graph.nodes):
        return None  # the graph holds what its nodes do not show
    described = tuple(map(_of_input, inputs))
    if None in described:
        return None
    position = {node: at for at, node in enumerate(captured.graph.nodes)}

    def of_arguments(node: fx.Node) -> str:
        given = (node.args, node.kwargs)
        return repr(fx.node.map_arg(given, lambda operand: f"%{position[operand]}"))

    nodes = tuple(
        (
            node.op,
            node.target,
            of_arguments(node),
            tuple(node.meta.get("nn_module_stack", {}).values()),
        )
        for node in captured.graph.nodes
    )
    state = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        Autocast.now(),
    )
    return frame_id(), model_class(), input_sources(captured), described, nodes, state


def _of_input(value: Any) -> Hashable | None:
    if not isinstance(value, Tensor):
        return repr(value)
    if type(value) not in _PLAIN or value.layout is not torch.strided:
        return None
    sizes = map(str, (*value.shape, *value.stride(), value.storage_offset()))
    is_parameter = isinstance(value, nn.Parameter)
    return is_parameter, *sizes, value.dtype, value.device, value.requires_grad
