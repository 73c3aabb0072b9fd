"""Module paths: which module of the model the nodes of a graph come from."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from torch import fx


def numbered_block(path: str) -> tuple[str, int | None]:
    """The outermost module list of a path, and the number in it.

    ``transformer_blocks.3.ff`` -> ("transformer_blocks", 3); ("", None) if there is no list.
    """
    parts = path.split(".")
    for position, part in enumerate(parts):
        if part.isdigit() and position:
            return ".".join(parts[:position]), int(part)
    return "", None


def common_path(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that all ``nodes`` lie in."""
    common: tuple[str, ...] | None = None
    for node in nodes:
        stack = node.meta.get("stack", ())
        if common is None:
            common = stack
        else:
            pairs = zip(common, stack, strict=False)
            common = tuple(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return common[-1] if common else ""
