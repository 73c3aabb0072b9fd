"""Which input is what, on graphs made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import pytest
import torch
from torch import Tensor, fx

from toca_fx.graph import roles

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

# The inputs, what is returned, and which of the inputs are latents.
CASES: dict[str, tuple[Shapes, Sequence[tuple[int, ...]], list[str]]] = {
    "as many channels": ({"x": (2, 4, 8, 8), "text": (2, 7, 16)}, [(2, 4, 8, 8)], ["x"]),
    "other channels": ({"text": (2, 7, 16), "x": (2, 4, 8, 8)}, [(2, 8, 8, 8)], ["x"]),
    "a video": ({"x": (2, 4, 3, 8, 8), "image": (2, 4, 8, 8)}, [(2, 4, 3, 8, 8)], ["x"]),
    "packed": ({"x": (2, 64, 16), "text": (2, 7, 24)}, [(2, 64, 16)], ["x"]),
    "another batch": ({"image": (1, 4, 8, 8), "x": (2, 4, 8, 8)}, [(2, 4, 8, 8)], ["x"]),
    "returned as a sequence": ({"x": (2, 4, 8, 8), "text": (2, 7, 24)}, [(2, 64, 16)], ["x"]),
    "nothing alike": ({"text": (2, 7, 24)}, [(2, 4, 8, 8)], []),
    "other channels beside other frames": (
        {"pose": (2, 4, 2, 8, 12), "video": (2, 12, 3, 8, 12)},
        [(2, 4, 3, 8, 12)],
        ["video"],
    ),
    "channels last beside other frames": (
        {"video": (2, 3, 8, 12, 9), "pose": (2, 2, 8, 6, 4)},
        [(2, 3, 8, 12, 4)],
        ["video"],
    ),
    "a condition of the same shape": (
        {"first_frame": (2, 72, 8), "hidden_states": (2, 72, 8)},
        [(2, 72, 8)],
        ["hidden_states"],
    ),
    "two of a kind": (
        {"video": (2, 72, 8), "sound": (2, 20, 8), "text": (2, 7, 24)},
        [(2, 72, 8), (2, 20, 8)],
        ["video", "sound"],
    ),
    "more than what is denoised": (
        {"backbone": (2, 72, 3), "features": (2, 72, 8)},
        [(2, 72, 3), (2, 72, 8), (2, 72, 20), (2, 72, 72)],
        ["backbone", "features"],
    ),
    "a list": (
        {"x[0]": (4, 1, 8, 8), "text[0]": (7, 24), "text[1]": (7, 24), "x[1]": (4, 1, 8, 8)},
        [(4, 1, 8, 8), (4, 1, 8, 8)],
        ["x[0]", "x[1]"],
    ),
    "a list of several sizes": (
        {"x[0]": (4, 1, 8, 8), "x[1]": (4, 1, 8, 12), "text[0]": (7, 24)},
        [(8, 1, 8, 8), (8, 1, 8, 12)],
        ["x[0]", "x[1]"],
    ),
    "a list that is returned as a batch": (
        {"image": (3, 1, 8, 8), "x[0]": (4, 1, 8, 8), "x[1]": (4, 1, 8, 8)},
        [(2, 4, 8, 8)],
        ["x[0]", "x[1]"],
    ),
    "a list beside a condition of its shape": (
        {"x[0]": (4, 1, 8, 8), "image": (4, 1, 8, 8), "x[1]": (4, 1, 8, 8)},
        [(4, 1, 8, 8), (4, 1, 8, 8)],
        ["x[0]", "x[1]"],
    ),
}


def _source(name: str) -> str:
    argument, bracket, index = name.partition("[")
    return f"L['{argument}']{bracket}{index}"


def _marked(
    inputs: Mapping[str, Tensor], returned: Sequence[tuple[int, ...]], state: str = "w"
) -> tuple[fx.Graph, dict[str, list[str]]]:
    """A graph with a parameter and these inputs, and the names of its inputs by their roles."""
    graph = fx.Graph()
    sources = [f"L['self']._parameters['{state}']", *map(_source, inputs)]
    values = [torch.nn.Parameter(torch.empty(2, 4, 8, 8)), *inputs.values()]
    for source, value in zip(sources, values, strict=True):
        graph.placeholder(source).meta["val"] = value
    results = [graph.call_function(torch.empty, (shape,)) for shape in returned]
    for result, shape in zip(results, returned, strict=True):
        result.meta["val"] = torch.empty(shape)
    graph.output(tuple(results))
    roles.mark(graph, sources, values)
    found: dict[str, list[str]] = {}
    names = ("state", *inputs)
    for name, node in zip(names, graph.find_nodes(op="placeholder"), strict=True):
        found.setdefault(node.meta["role"], []).append(name)
    return graph, found


@pytest.mark.parametrize("case", CASES)
def test_latents_are_like_what_the_model_returns(case: str) -> None:
    shapes, returned, expected = CASES[case]
    graph, found = _marked({name: torch.empty(shapes[name]) for name in shapes}, returned)
    assert found.get("latents", []) == expected
    if expected:
        assert roles.latents_shape(graph) == shapes[expected[0]]
    is_image = bool(expected) and len(shapes[expected[0]]) == 4
    assert roles.aspect(graph) == (shapes[expected[0]][2:] if is_image else None)


FLOAT, WHOLE = torch.zeros(2), torch.zeros(2, dtype=torch.long)
X = torch.zeros(2, 4, 8, 8)


@pytest.mark.parametrize(
    ("inputs", "timestep", "others"),
    [
        ({"guidance": FLOAT, "timestep": FLOAT}, "timestep", []),
        ({"noise_level": FLOAT}, "noise_level", []),
        ({"noise_level": FLOAT, "guidance": FLOAT}, None, []),
        ({"label": WHOLE}, None, []),
        (
            {"audio_timestep": FLOAT, "sigma": FLOAT, "timestep": FLOAT, "guidance": FLOAT},
            "timestep",
            ["audio_timestep", "sigma"],
        ),
        ({"timestep": WHOLE, "timestep_r": FLOAT}, "timestep", ["timestep_r"]),
        ({"r_timestep": FLOAT, "timestep": FLOAT}, "timestep", ["r_timestep"]),
        ({"backbone_time": FLOAT, "sound_time": FLOAT}, "backbone_time", ["sound_time"]),
        ({"scale": FLOAT, "vision_timesteps": torch.zeros(72)}, "vision_timesteps", []),
        (
            {"timestep": FLOAT, "timestep_cond": torch.zeros(2, 8), "time_ids": torch.zeros(2, 6)},
            "timestep",
            [],
        ),
        ({"timestep": FLOAT, "timestep_indices": WHOLE, "runtime": FLOAT}, "timestep", []),
    ],
    ids=[
        "by name",
        "the only number per sample",
        "two of them",
        "an integer",
        "three by name",
        "where the step leads to",
        "where it leads to, first",
        "each its own",
        "by the end of its name",
        "names that only begin alike",
        "names that are only alike",
    ],
)
def test_timesteps_are_found(
    inputs: dict[str, Tensor], timestep: str | None, others: list[str]
) -> None:
    _, found = _marked({"x": X, **inputs}, [tuple(X.shape)])
    assert found.get("timestep", []) == ([timestep] if timestep else [])
    assert found.get("other timestep", []) == others
    assert found["latents"] == ["x"]
    named = {timestep, *others}
    assert found.get("condition", []) == [name for name in inputs if name not in named]


@pytest.mark.parametrize("name", ["sigma", "train_sigmas"])
def test_a_table_of_the_model_is_no_timestep(name: str) -> None:
    _, found = _marked({"x": X, "noise_level": FLOAT}, [tuple(X.shape)], state=name)
    assert found == {"state": ["state"], "latents": ["x"], "timestep": ["noise_level"]}
