"""Whether two captures are of one graph.

An adapter that goes and comes again, by another name too, is captured anew, and computed as before.
Threads that call a model first capture it each.

Dynamo compiles a call for every thread that found nothing compiled, one after the other, and then
hands the calls of all threads to whichever result comes first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from toca_fx.capture.sources import captured_model, frame_id, input_sources, model_class
from toca_fx.graph.autocast import Autocast
from toca_fx.torch_private import FakeTensor

_PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)


def identity(captured: fx.GraphModule, inputs: Sequence[Any]) -> Hashable | None:
    """A key that is equal for captures of one code, by Dynamo, to one graph, in one state of torch.

    It does not tell which adapters the model has, by name, nor which weights.

    None where that cannot be told. Dynamo has to be capturing right now.
    """
    if any(node.op == "get_attr" for node in captured.graph.nodes):
        return None  # the graph holds what its nodes do not show
    described = tuple(map(_of_input, inputs))
    if None in described:
        return None
    position = {node: at for at, node in enumerate(captured.graph.nodes)}
    sources, plain = _without_names(input_sources(captured))

    def of_arguments(node: fx.Node) -> str:
        given = (node.args, node.kwargs)
        return repr(fx.node.map_arg(given, lambda operand: f"%{position[operand]}"))

    nodes = tuple(
        (
            node.op,
            None if node.op == "placeholder" else node.target,  # ``sources`` name it
            of_arguments(node),
            tuple(
                (plain(source), *kind)
                for source, *kind in node.meta.get("nn_module_stack", {}).values()
            ),
        )
        for node in captured.graph.nodes
    )
    state = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        Autocast.now(),
    )
    return frame_id(), model_class(), sources, described, nodes, state


def _without_names(
    sources: Sequence[str],
) -> tuple[tuple[str, ...], Callable[[str], str]]:
    """``sources`` without the names that the user gave to adapters, and what takes them out.

    An adapter is known by its place among those of the model: another one of the same rank is
    computed in the same way.
    """
    # Where peft keeps the adapters of a model, by their names.
    adapters = getattr(captured_model(), "peft_config", None)
    names = sorted(map(str, adapters), key=len, reverse=True) if adapters else []
    if not names:
        return tuple(sources), str
    name = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, names))})(?![\w-])")
    found = dict.fromkeys(match[0] for source in sources for match in name.finditer(source))
    place = {each: f"adapter {at}" for at, each in enumerate(found)}

    @cache
    def plain(text: str) -> str:
        return name.sub(lambda match: place.setdefault(match[0], f"adapter {len(place)}"), text)

    return tuple(map(plain, sources)), plain


def _of_input(value: Any) -> Hashable | None:
    if not isinstance(value, Tensor):
        return repr(value)
    if type(value) not in _PLAIN or value.layout is not torch.strided:
        return None
    sizes = map(str, (*value.shape, *value.stride(), value.storage_offset()))
    is_parameter = isinstance(value, nn.Parameter)
    return is_parameter, *sizes, value.dtype, value.device, value.requires_grad
