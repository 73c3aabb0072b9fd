"""The roles of a graph's inputs.

state       a parameter or buffer of the model, or a number: the same at every step
timestep    what says how noisy the latents are
latents     what the model's output is shaped like
condition   all other inputs: captions, labels, masks, sizes, positions
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

Role = Literal["state", "timestep", "latents", "condition"]

_TIMESTEPS = ("timestep", "timesteps", "t", "sigma", "time")  # arguments of forward, best first
_ATTRIBUTES = re.compile(
    r"(?:\._orig_mod)*\.(?:__dict__\['_(?:modules|buffers|parameters)'\]|"
    r"_(?:modules|buffers|parameters)\[)"
)


def model_name(sources: Iterable[str]) -> str:
    """What Dynamo calls the model, by the names of all inputs: ``L['self']``, mostly.

    Where a function is captured that calls the model, or a forward whose first argument has another
    name, it is another. It is "" if there are several models, none of which is part of one.
    """
    found = {source[: at.start()] for source in sources if (at := _ATTRIBUTES.search(source))}
    shortest = min(found, key=len, default="L['self']")
    return shortest if all(is_part(name, shortest) for name in found) else ""


def is_part(source: str, model: str) -> bool:
    """Whether something of that name is the model, or an attribute of it or of its modules."""
    behind = source.removeprefix(model)
    return bool(model) and source.startswith(model) and behind[:1] in ("", ".", "[")


def is_state(source: str, value: object, model: str = "L['self']") -> bool:
    """Whether an input of that name (see ``capture/sources.py``) is a parameter or a buffer."""
    named = is_part(source, model) or _ATTRIBUTES.search(source) is not None
    return named or isinstance(value, torch.nn.Parameter)


def mark(graph: fx.Graph, sources: Sequence[str], inputs: Sequence[Any]) -> None:
    """Set ``meta["role"]`` of the placeholders, and ``meta["constant"]`` of all nodes.

    A node is constant if it depends on state only.
    """
    placeholders, model = graph.find_nodes(op="placeholder"), model_name(sources)
    for node, source, value in zip(placeholders, sources, inputs, strict=True):
        constant = is_state(source, value, model) or not isinstance(value, Tensor)
        node.meta["constant"] = constant
        node.meta["role"] = "state" if constant else "condition"
    for node in graph.nodes:
        if node.op != "placeholder":
            node.meta["constant"] = node.op != "output" and all(
                operand.meta["constant"] for operand in node.all_input_nodes
            )
    timestep = timestep_position(sources, inputs)
    if timestep is not None:
        placeholders[timestep].meta["role"] = "timestep"
    for node in _latents(graph):
        node.meta["role"] = "latents"


def timestep_position(sources: Sequence[str], inputs: Sequence[Any]) -> int | None:
    """The position of the input that holds the timestep, None if it is not clear which one does.

    It is found by the name of the forward's argument, or else by its shape.
    """
    for name in _TIMESTEPS:
        for position, source in enumerate(sources):
            if source.endswith(f"['{name}']") and isinstance(inputs[position], Tensor):
                return position
    # Otherwise it is the one input that has a number for each sample, or for all of them.
    model = model_name(sources)
    candidates = [
        position
        for position, (source, value) in enumerate(zip(sources, inputs, strict=True))
        if source
        and not is_state(source, value, model)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() <= 1
    ]
    return candidates[0] if len(candidates) == 1 else None


def _latents(graph: fx.Graph) -> list[fx.Node]:
    """For each tensor that the model returns, the condition so far that is shaped most like it."""
    (returned,) = graph.find_nodes(op="output")
    inputs = [
        node
        for node in graph.find_nodes(op="placeholder")
        if node.meta["role"] == "condition" and node.meta["val"].is_floating_point()
    ]
    found = [
        _most_like(node.meta["val"].shape, inputs)
        for node in returned.all_input_nodes
        if isinstance(node.meta.get("val"), Tensor)
    ]
    return [node for node in found if node is not None]


def _most_like(shape: torch.Size, inputs: Sequence[fx.Node]) -> fx.Node | None:
    """The first of those of ``inputs`` that are shaped most like an output of this ``shape``.

    The output may have other channels: a variance as well, or none of a condition that came with
    the latents. It may also be a sequence of patches, to which a text is as alike in the number of
    axes only; then an image or a video is the better guess.
    """
    alike = [node for node in inputs if node.meta["val"].dim() == len(shape)]
    equal = [_equal_axes(node.meta["val"].shape, shape) for node in alike]
    images = [node for node in inputs if node.meta["val"].dim() >= 4]
    if any(axes for axes, _ in equal) or (alike and not images):
        return alike[equal.index(max(equal))]
    return images[0] if images else None


def _equal_axes(one: Sequence[int], other: Sequence[int]) -> tuple[int, bool]:
    """How many axes behind the first have the same size, and whether the first has."""
    same = [a == b for a, b in zip(one, other, strict=True)]
    return sum(same[1:]), bool(same) and same[0]


def positions(graph: fx.Graph, role: Role) -> tuple[int, ...]:
    """The positions of the inputs with a role."""
    nodes = graph.find_nodes(op="placeholder")
    return tuple(at for at, node in enumerate(nodes) if node.meta["role"] == role)


def latents_shape(graph: fx.Graph) -> torch.Size | None:
    """The shape of the first latents; None if nothing that comes in is like what goes out."""
    nodes = graph.find_nodes(op="placeholder")
    at = positions(graph, "latents")
    return nodes[at[0]].meta["val"].shape if at else None


def aspect(graph: fx.Graph) -> tuple[int, int] | None:
    """Height and width of the latents, if they are images [B, C, H, W].

    None if they are not, or if no input is recognised as latents; buffers and weights are none.
    """
    shape = latents_shape(graph)
    return (shape[2], shape[3]) if shape is not None and len(shape) == 4 else None
