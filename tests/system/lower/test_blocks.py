"""How many graphs a compiler is given, cut between blocks, in whole generations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx

import toca_fx
from tests.helpers import make_inputs, make_policy, run_all, text_inputs, tiny
from tests.marks import slow_but
from toca_fx.graph.ops import aten


class Compiled:
    """The inner backend "eager", which keeps the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward


@pytest.mark.parametrize(
    "kind",
    slow_but(["joint"], ["diffusers", "original", "cross", "joint"], "one model is enough"),
)
def test_the_number_of_compilations_does_not_depend_on_the_number_of_blocks(kind: str) -> None:
    counts, steps = [], []
    for layers in (3, 5):
        inner, model = Compiled(), tiny(kind, layers=layers)
        inputs = text_inputs() if kind in ("cross", "joint") else make_inputs(dtype=torch.float64)
        fast = toca_fx.compile(model.double(), make_policy(), inner=inner)
        with toca_fx.session() as run:
            run_all(fast, inputs)
        counts.append(len(inner.graphs))
        steps.append(run.report().compiled_graphs)
    assert steps == [2, 2]
    # Before, block, after; the first block may get another layout, the last may have dead ends.
    assert counts[0] == counts[1] <= 2 * 5 + 1


def test_attention_is_compiled_once_for_all_blocks() -> None:
    inner, model = Compiled(), tiny("diffusers", layers=4)
    with toca_fx.session():
        run_all(
            toca_fx.compile(model, make_policy(scores={"random": 1.0}), inner=inner), make_inputs()
        )
    targets = Counter(node.target for graph in inner.graphs for node in graph.graph.nodes)
    assert targets[aten.scaled_dot_product_attention.default] == 1


@pytest.mark.slow(reason="two models of five blocks")
def test_a_block_that_does_something_else_is_compiled_by_itself() -> None:
    def compiled(**sections: Any) -> int:
        inner = Compiled()
        with toca_fx.session():
            run_all(
                toca_fx.compile(tiny("diffusers", layers=5), make_policy(**sections), inner=inner),
                make_inputs(),
            )
        return len(inner.graphs)

    assert compiled(rules=[{"layers": 2, "match": "mlp", "module": "reuse"}]) > compiled()


def test_without_equal_blocks_the_graph_stays_whole() -> None:
    inner = Compiled()
    with toca_fx.session():
        run_all(
            toca_fx.compile(
                tiny("diffusers", layers=1), make_policy(hoisting={"memory": 0}), inner=inner
            ),
            make_inputs(steps=1),
        )
    assert len(inner.graphs) == 1
