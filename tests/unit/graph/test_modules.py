"""Which block a module path lies in, and which module nodes share."""

from __future__ import annotations

import pytest
from torch import fx

from toca_fx.graph.modules import blocks_of, common_path, numbered_block


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("transformer_blocks.3.ff", ("transformer_blocks", 3)),
        ("down.blocks.12", ("down.blocks", 12)),
        ("blocks.0.experts.5.up", ("blocks", 0)),
        ("blocks.3@1.ff", ("blocks@1", 3)),
        ("trunk@1.blocks.3.ff", ("trunk@1.blocks", 3)),
        ("block@1.ff", ("", None)),
        ("0.attn", ("", None)),
        ("time_embed.linear_1", ("", None)),
        ("", ("", None)),
    ],
)
def test_the_outermost_numbered_list_counts(path: str, block: tuple[str, int | None]) -> None:
    assert numbered_block(path) == block


# By what the modules are called and of which class they are: the paths of the adds to the stream,
# in order, and the block of each; of nodes that are no adds (they have no class), the same.
BLOCKS: dict[str, tuple[list[tuple[str, str]], list[tuple[str, int | None]]]] = {
    "a list": ([("blocks.4", "Block"), ("blocks.2", "Block")], [("blocks", 4), ("blocks", 2)]),
    "a number in the name": ([("block7", "A"), ("block_9", "B")], [("block", 0), ("block", 1)]),
    "one class": ([("up", "Block"), ("down", "Block")], [("Block", 0), ("Block", 1)]),
    "several classes": ([("up", "Up"), ("down", "Down")], [("", None), ("", None)]),
    "one alone": ([("block1", "Block")], [("", None)]),
    "a container": ([("stages.b", "B"), ("stages.a", "A")], [("stages", 0), ("stages", 1)]),
    "one in a container": ([("stages.b", "B")], [("stages", 0)]),
    "calls of one": ([("block@0", "B"), ("block@1", "B")], [("B", 0), ("B", 1)]),
    "calls of a list": (
        [("l.0@0", "B"), ("l.1@0", "B"), ("l.0@1", "B"), ("l.1@1", "B")],
        [("l", 0), ("l", 1), ("l", 2), ("l", 3)],
    ),
    "nothing is added in one of them": (
        [("up", "Block"), ("down", "Block"), ("other.linear", "")],
        [("Block", 0), ("Block", 1), ("", None)],
    ),
    "a list inside of a block": (
        [("up", "Block"), ("up.mlp.0", ""), ("down", "Block"), ("down.mlp.2", "")],
        [("Block", 0), ("Block", 0), ("Block", 1), ("Block", 1)],
    ),
    "lists with adds around": (
        [("one", "Net"), ("one.l.0", "B"), ("two", "Net"), ("two.l.3", "B")],
        [("", None), ("one.l", 0), ("", None), ("two.l", 3)],
    ),
    "calls of what has blocks inside": (
        [("net@0.a1", "A"), ("net@0.a2", "A"), ("net@1.a1", "A"), ("net@1.a2", "A")],
        [("net.a", 0), ("net.a", 1), ("net.a", 2), ("net.a", 3)],
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    made, expected = BLOCKS[name]
    graph = fx.Graph()
    nodes, joins = [], []
    containers = ("stages", "l", "blocks", "other")
    for path, kind in made:
        parts = path.split(".")
        prefixes = [".".join(parts[: at + 1]) for at in range(len(parts))]
        stack = [prefix for prefix in prefixes if prefix.rpartition(".")[2] not in containers]
        node = graph.placeholder("node")
        node.meta = {"path": path, "stack": tuple(stack)}
        node.meta["classes"] = ("Outer",) * (len(stack) - 1) + (kind,)
        nodes.append(node)
        joins += [node] if kind else []
    found = blocks_of(nodes, joins)
    assert [found[node] for node in nodes] == expected


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
