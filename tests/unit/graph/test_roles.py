"""Which input is what, on graphs made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from toca_fx.graph import roles

CASES = {
    "as many channels": ({"x": (2, 4, 8, 8), "text": (2, 7, 16)}, (2, 4, 8, 8), "x"),
    "other channels": ({"text": (2, 7, 16), "x": (2, 4, 8, 8)}, (2, 8, 8, 8), "x"),
    "a video": ({"x": (2, 4, 3, 8, 8), "image": (2, 4, 8, 8)}, (2, 4, 3, 8, 8), "x"),
    "packed": ({"x": (2, 64, 16), "text": (2, 7, 24)}, (2, 64, 16), "x"),
    "another batch": ({"image": (1, 4, 8, 8), "x": (2, 4, 8, 8)}, (2, 4, 8, 8), "x"),
    "returned as a sequence": ({"x": (2, 4, 8, 8), "text": (2, 7, 24)}, (2, 64, 16), "x"),
    "nothing alike": ({"text": (2, 7, 24)}, (2, 4, 8, 8), None),
}


@pytest.mark.parametrize("case", CASES)
def test_latents_are_like_what_the_model_returns(case: str) -> None:
    shapes, returned, expected = CASES[case]
    graph, names = fx.Graph(), ["L['self']._parameters['w']", *(f"L['{name}']" for name in shapes)]
    inputs = [torch.nn.Parameter(torch.empty(2, 4, 8, 8)), *map(torch.empty, shapes.values())]
    for name, value in zip(("w", *shapes), inputs, strict=True):
        graph.placeholder(name).meta["val"] = value
    result = graph.call_function(torch.empty, (returned,))
    result.meta["val"] = torch.empty(returned)
    graph.output(result)
    roles.mark(graph, names, inputs)
    found = [node.name for node in graph.nodes if node.meta.get("role") == "latents"]
    assert found == ([expected] if expected else [])
    if expected:
        assert roles.latents_shape(graph) == shapes[expected]
    is_image = expected is not None and len(shapes[expected]) == 4
    assert roles.aspect(graph) == (shapes[expected][2:] if expected and is_image else None)
