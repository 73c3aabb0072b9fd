"""Which numbered block a module path lies in, and which module nodes share."""

from __future__ import annotations

import pytest
from torch import fx

from toca_fx.graph.modules import common_path, numbered_block


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("transformer_blocks.3.ff", ("transformer_blocks", 3)),
        ("down.blocks.12", ("down.blocks", 12)),
        ("blocks.0.experts.5.up", ("blocks", 0)),
        ("0.attn", ("", None)),
        ("time_embed.linear_1", ("", None)),
        ("", ("", None)),
    ],
)
def test_the_outermost_numbered_list_counts(path: str, block: tuple[str, int | None]) -> None:
    assert numbered_block(path) == block


@pytest.mark.parametrize(
    ("stacks", "path"),
    [
        ([("blocks.0", "blocks.0.ff"), ("blocks.0", "blocks.0.ff")], "blocks.0.ff"),
        ([("blocks.0", "blocks.0.ff"), ("blocks.0", "blocks.0.attn")], "blocks.0"),
        ([("blocks.0", "blocks.0.ff"), ("blocks.0",)], "blocks.0"),
        ([("blocks.0",), ("blocks.1",)], ""),
        ([], ""),
    ],
)
def test_nodes_share_the_innermost_module_around_them(
    stacks: list[tuple[str, ...]], path: str
) -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"input_{number}") for number in range(len(stacks))]
    for node, stack in zip(nodes, stacks, strict=True):
        node.meta["stack"] = stack
    assert common_path(nodes) == path
