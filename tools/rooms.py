"""Who imports whom: the rooms of the package, counted.

python -m tools.rooms            # floors, arrows, and the imports of each room
python -m tools.rooms --picture docs/rooms.svg      # the same as a picture
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import networkx as nx

PACKAGE = Path(__file__).resolve().parent.parent / "toca_fx"


def rooms(package: Path = PACKAGE) -> nx.DiGraph:
    """The folders and top-level modules of ``package``, with an edge for each import.

    Imports inside functions count.
    """
    found = nx.DiGraph()
    for file in sorted(package.rglob("*.py")):
        own = _room(file.relative_to(package).with_suffix("").parts)
        found.add_node(own)
        for name in _imports(file, package.name):
            other = _room(name)
            if other != own:
                found.add_edge(own, other)
    return found


def _room(parts: Sequence[str]) -> str:
    return parts[0] if parts else "__init__"


def _imports(file: Path, package: str) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a file imports, as parts behind its name."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == package:
            names = [f"{package}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            if name.partition(".")[0] != package:
                continue
            parts = tuple(name.split(".")[1:])
            root = file.parents[len(file.relative_to(PACKAGE).parts) - 1]
            is_module = parts and any((root / f"{parts[0]}{end}").exists() for end in ("", ".py"))
            yield parts if is_module else ()


def floors(graph: nx.DiGraph) -> int:
    """The length of the longest chain of imports; raises ValueError for a circle."""
    if not nx.is_directed_acyclic_graph(graph):
        raise ValueError(f"a circle of imports: {nx.find_cycle(graph)}")
    return len(nx.dag_longest_path(graph))


def draw(graph: nx.DiGraph, file: str) -> None:
    """Draw every room on its floor, the entries on top.

    Rooms that are open to all are left out, and arrows that other arrows imply.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rooms"
    from matplotlib import pyplot as plt

    shown = graph.subgraph(set(graph) - {"diagnostics", "__init__", "__main__"})
    heights: dict[str, int] = {}
    for room in reversed(list(nx.topological_sort(shown))):
        heights[room] = max((heights[other] + 1 for other in shown[room]), default=0)
    places = {}
    for height in range(max(heights.values()) + 1):
        row = sorted(room for room in heights if heights[room] == height)
        for at, room in enumerate(row):
            places[room] = (2.6 * (at - (len(row) - 1) / 2) + 0.7 * (-1) ** height, 1.2 * height)
    figure, axes = plt.subplots(figsize=(8, 8))
    for one, other in nx.transitive_reduction(shown).edges:
        bend = {"arrowstyle": "->", "color": "0.65", "shrinkA": 16, "shrinkB": 18}
        bend["connectionstyle"] = "arc3,rad=0.08"
        axes.annotate("", places[other], places[one], arrowprops=bend)
    for room, place in places.items():
        box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "0.2"}
        axes.text(*place, room, ha="center", va="center", bbox=box, fontsize=11)
    width = max(abs(x) for x, _ in places.values()) + 1.5
    axes.set_xlim(-width, width)
    axes.set_ylim(-0.8, max(y for _, y in places.values()) + 0.8)
    axes.axis("off")
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", metavar="FILE", help="draw the rooms to this file instead")
    graph, file = rooms(), parser.parse_args(argv).picture
    if file:
        draw(graph, file)
        return 0
    for room in sorted(graph):
        print(f"{room:16} {', '.join(sorted(graph[room]))}")
    print(f"{len(graph)} rooms, {floors(graph)} floors, {graph.number_of_edges()} arrows")
    print("the longest chain:", " -> ".join(nx.dag_longest_path(graph)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
