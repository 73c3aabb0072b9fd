"""Module paths: which module of the model the nodes of a graph come from, and which block."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile

from torch import fx

Block = tuple[str, int | None]
OUTSIDE: Block = ("", None)

_CALL = re.compile(r"@\d+")
_STEM = re.compile(r"(.+?)_?\d+")


def numbered_block(path: str) -> Block:
    """The outermost module list of a path, and the number in it.

    ``transformer_blocks.3.ff`` -> ("transformer_blocks", 3); ("", None) if there is no list. A list
    whose modules are called several times counts as one list per call: ``blocks.3@1.ff`` ->
    ("blocks@1", 3).
    """
    parts = path.split(".")
    for position, part in enumerate(parts):
        number, at, call = part.partition("@")
        if number.isdigit() and position:
            return ".".join(parts[:position]) + at + call, int(number)
    return OUTSIDE


def blocks_of(nodes: Iterable[fx.Node], joins: Collection[fx.Node]) -> Mapping[fx.Node, Block]:
    """The block that each node lies in, and its number; ("", None) outside of blocks.

    ``joins`` are the adds of the residual streams. Blocks are the modules of the outermost list of
    a path. Where there is no list, they are the outermost modules that have such adds inside and
    belong together, numbered in order of appearance: all of a container (``blocks.first``), those
    whose names differ in a number (``block1``), those of one class in one module, or the calls of
    one module. Modules of a list that are called several times are numbered like that, too.
    """
    named = _named_blocks(nodes, joins)
    lists = {node: numbered_block(node.meta.get("path", "")) for node in nodes}
    repeated = {_CALL.sub("", name) for name, _ in lists.values() if "@" in name}
    seen: defaultdict[str, dict[object, int]] = defaultdict(dict)

    def in_order(name: str, member: object) -> Block:
        return name, seen[name].setdefault(member, len(seen[name]))

    found = {}
    for node, block in lists.items():
        name = _CALL.sub("", block[0])
        paths = [path for path in node.meta.get("stack", ()) if path in named]
        if paths:
            path = min(paths, key=named.__getitem__)
            found[node] = in_order(named[path][1], path)
        else:
            found[node] = in_order(name, block) if name in repeated else block
    return found


def _named_blocks(
    nodes: Iterable[fx.Node], joins: Collection[fx.Node]
) -> Mapping[str, tuple[tuple[bool, int], str]]:
    """The modules in no list that are blocks, by path: which goes first, and what they are called.

    The outermost go first, the calls of one module last. What has lists of blocks inside is none.
    """
    called = {path for node in nodes for path in node.meta.get("stack", ())}
    kinds: defaultdict[tuple[str, bool], dict[str, int]] = defaultdict(dict)
    outer: set[str] = set()
    for join in joins:
        stack, classes = join.meta.get("stack", ()), join.meta.get("classes", ())
        if numbered_block(join.meta.get("path", "")) != OUTSIDE:
            outer.update(stack)
            continue
        for depth, (path, kind) in enumerate(zip(stack, classes, strict=True)):
            kinds[_kind(path, kind, called)][path] = depth
    found = {}
    for (name, is_container), members in kinds.items():
        modules = {_CALL.sub("", path) for path in members}
        if is_container or len(members) > 1:
            for path, depth in members.items():
                found[path] = (len(modules) == 1, depth), name
    return {path: block for path, block in found.items() if path not in outer}


def _kind(path: str, kind: str, called: Collection[str]) -> tuple[str, bool]:
    """What the modules that belong together with that at ``path`` are called.

    And whether they are all that a container holds: a module that is never called itself.
    """
    parent, _, name = path.rpartition(".")
    where = _CALL.sub("", parent)
    if parent and parent not in called:
        return where, True
    stem = _STEM.fullmatch(_CALL.sub("", name))
    return f"{where}.{stem[1] if stem else kind}".lstrip("."), False


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
