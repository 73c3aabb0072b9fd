"""Which module, and which call of it, the nodes of a graph come from."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

from torch import fx

from toca_fx.capture.sources import clean_path


class Frame(NamedTuple):
    """One call of a module; ``key`` is Dynamo's name of it, another for each call."""

    path: str
    key: str
    kind: str


def mark(graph: fx.Graph, model: str) -> None:
    """Put the paths of the modules that a node lies in on its ``meta``.

    ``model`` is Dynamo's name of the model, in which paths begin (see ``clean_path``).

    ``meta["stack"]`` has them all, outermost first, and ``meta["path"]`` the innermost, such as
    ``transformer_blocks.3.ff``; () and "" outside any submodule. Where a module that has others
    inside is called several times, a path says which call it is: ``block@0.attn``,
    ``block@1.attn``. ``meta["classes"]`` has the names of the modules' classes.
    """
    stacks = {node: _stack(node, model) for node in graph.nodes}
    # Calls are counted within each call of the modules around them.
    calls: defaultdict[tuple[Frame, ...], dict[Frame, None]] = defaultdict(dict)
    outer: set[str] = set()
    for stack in stacks.values():
        outer.update(frame.path for frame in stack[:-1])
        for depth, frame in enumerate(stack):
            calls[stack[:depth]].setdefault(frame)
    repeated = {
        path
        for inside in calls.values()
        for path, times in Counter(frame.path for frame in inside).items()
        if times > 1 and path in outer
    }
    for node, stack in stacks.items():
        paths: list[str] = []
        around = named = ""  # a path without numbers of calls, and the same with them
        for depth, frame in enumerate(stack):
            is_within = frame.path.startswith(f"{around}.")
            named = named + frame.path[len(around) :] if is_within else frame.path
            if frame.path in repeated:
                same = [one for one in calls[stack[:depth]] if one.path == frame.path]
                named += f"@{same.index(frame)}"
            around = frame.path
            paths.append(named)
        node.meta["stack"] = tuple(paths)
        node.meta["classes"] = tuple(frame.kind for frame in stack)
        node.meta["path"] = paths[-1] if paths else ""


def _stack(node: fx.Node, model: str) -> tuple[Frame, ...]:
    """The calls of modules that a node lies in, outermost first."""
    found = []
    for key, (source, kind, *_) in node.meta.get("nn_module_stack", {}).items():
        path = clean_path(source, model)
        if path:
            found.append(Frame(path, str(key), str(getattr(kind, "__name__", kind))))
    return tuple(found)
