"""How many captures of one code Dynamo makes, and how many it keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from toca_fx.torch_private import captured_any_number_of_times, captures, keep_captures


def test_the_least_recently_used_captures_go() -> None:
    made = 0

    def function(x: torch.Tensor, scale: int) -> torch.Tensor:
        return x * scale

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        nonlocal made
        made += 1
        return graph

    def call(scale: int) -> None:
        with captured_any_number_of_times():
            assert compiled(torch.ones(1), scale) == scale

    compiled = torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
    code = function.__code__
    for scale in range(12):  # Dynamo's limit is 8
        call(scale)
    assert len(captures(code)) == made == 12
    keep_captures(code, 3, lambda own: own is not backend)
    assert len(captures(code)) == 12
    call(0)
    keep_captures(code, 3, lambda own: own is backend)
    assert len(captures(code)) == 3
    for scale in (0, 11, 10):
        call(scale)
    assert made == 12
    call(9)
    assert (made, len(captures(code))) == (13, 4)
