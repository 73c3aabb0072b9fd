"""The roles of a graph's inputs.

state           a parameter or buffer of the model, or a number: the same at every step
timestep        what says how noisy the latents are
other timestep  where there are several: of the sound beside a video, or where the step leads to
latents         what the model's output is shaped like; a model may take a list, one per sample
condition       all other inputs: captions, labels, masks, sizes, positions
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

Role = Literal["state", "timestep", "other timestep", "latents", "condition"]

# Arguments of forward: of timesteps, best first, and of latents.
_TIMESTEPS = ("timestep", "timesteps", "t", "sigma", "time")
_LATENTS = ("hidden_states", "x", "sample", "latents")
# `audio_timestep`, `timestep_r`, `bb_ca_time`; `timestep_cond` and `time_ids` are conditions.
_OF_ONE_KIND = re.compile(r"(?:\w+_)?(?:timesteps?|sigmas?|times?)(?:_[a-z])?")
_ARGUMENT = re.compile(r"\['(\w+)'\]$")
_ITEM = re.compile(r"(?:\[\d+\])+$")
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


def state_name(sources: Iterable[str], name: str) -> str:
    """A name by which an input besides those of ``sources`` counts as state of their model."""
    return f"{model_name(sources) or 'L'}._buffers['{name}']"


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
    for order, at in enumerate(timesteps(sources, inputs)):
        placeholders[at].meta["role"] = "other timestep" if order else "timestep"
    for node in _latents(graph, dict(zip(placeholders, sources, strict=True))):
        node.meta["role"] = "latents"


def trust_names(graph: fx.Graph, sources: Sequence[str]) -> None:
    """Of a part of a model that has no block: nothing is latents but what is called so.

    What it returns is embeddings, which are shaped like a caption.
    """
    for node, source in zip(graph.find_nodes(op="placeholder"), sources, strict=True):
        if node.meta["role"] == "latents" and _argument(source) not in _LATENTS:
            node.meta["role"] = "condition"


def timesteps(sources: Sequence[str], inputs: Sequence[Any]) -> tuple[int, ...]:
    """The positions of the inputs that hold timesteps, first the one that tells steps apart.

    They are found by the names of the forward's arguments, or else there is one, found by its
    shape. There are none if it is not clear which one it is.
    """
    model = model_name(sources)
    names = {
        at: _argument(source)
        for at, (source, value) in enumerate(zip(sources, inputs, strict=True))
        if source and isinstance(value, Tensor) and not is_state(source, value, model)
    }
    known = [at for best in _TIMESTEPS for at, name in names.items() if name == best]
    alike = [at for at, name in names.items() if _OF_ONE_KIND.fullmatch(name)]
    if found := dict.fromkeys((*known, *alike)):
        return tuple(found)
    # Otherwise it is the one input that has a number for each sample, or for all of them.
    numbers = [at for at in names if inputs[at].is_floating_point() and inputs[at].dim() <= 1]
    return tuple(numbers) if len(numbers) == 1 else ()


def _argument(source: str) -> str:
    """The name of the forward's argument, of a list or of a dictionary's entry; "" if unknown."""
    found = _ARGUMENT.search(_list(source) or source)
    return "" if found is None else found[1]


def _latents(graph: fx.Graph, sources: Mapping[fx.Node, str]) -> set[fx.Node]:
    """For each tensor that the model returns, the conditions so far that are shaped most like it:
    one of them, or several in one list.
    """
    (returned,) = graph.find_nodes(op="output")
    inputs = {
        node: source
        for node, source in sources.items()
        if node.meta["role"] == "condition" and node.meta["val"].is_floating_point()
    }
    shapes = {
        node.meta["val"].shape
        for node in returned.all_input_nodes
        if isinstance(node.meta.get("val"), Tensor)
    }
    return {node for shape in shapes for node in _most_like(shape, inputs)}


def _most_like(shape: torch.Size, inputs: Mapping[fx.Node, str]) -> list[fx.Node]:
    """Those of ``inputs`` that are shaped most like an output of this ``shape``.

    The output may have other channels: a variance as well, or none of a condition that came with
    the latents. It may also be a sequence of patches, to which a text is as alike in the number of
    axes only; then an image or a video is the better guess. Of several that are as alike it is the
    one with the name of latents, or else the first, and what is in one list with it.
    """
    shapes = {node: node.meta["val"].shape for node in inputs}
    found = {node: _likeness(own, shape) for node, own in shapes.items() if len(own) == len(shape)}
    images = [node for node, own in shapes.items() if len(own) >= 4]
    if images and not any(equal for _, equal, _ in found.values()):
        found = dict.fromkeys(images, (0, 0, False))
    if not found:
        return []
    best = max(found, key=lambda node: (found[node], _argument(inputs[node]) in _LATENTS))
    together = _list(inputs[best])
    return [
        node
        for node, likeness in found.items()
        if node is best
        or (together and likeness == found[best] and _list(inputs[node]) == together)
    ]


def _likeness(one: Sequence[int], other: Sequence[int]) -> tuple[int, int, bool]:
    """How alike two shapes of one rank are, as something to compare.

    First comes how few axes differ besides the channels, which are axis 1 or the last one, then how
    many axes behind the first have the same size, then whether the first has: that is the batch.
    """
    same = [a == b for a, b in zip(one, other, strict=True)]
    differ = len(same[1:]) - sum(same[1:])
    channels = len(same) > 1 and not (same[1] and same[-1])
    return channels - differ, sum(same[1:]), bool(same) and same[0]


def _list(source: str) -> str:
    """The name of the list, or of the list of lists, that an input is in; "" if it is in none."""
    items = _ITEM.search(source)
    return "" if items is None else source[: items.start()]


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
