"""Module paths: which module of the model the nodes of a graph come from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx


def numbered_block(path: str) -> tuple[str, int | None]:
    """``transformer_blocks.3.ff`` -> ("transformer_blocks", 3): the outermost numbered module
    list.
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
            length = next(
                (i for i, (a, b) in enumerate(zip(common, stack, strict=False)) if a != b),
                min(len(common), len(stack)),
            )
            common = common[:length]
    return common[-1] if common else ""
