"""From an anchor to the residual stream: the module's output, and the add that joins the two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

from torch import fx

from toca_fx.graph.axes import shape_of
from toca_fx.graph.modules import OUTSIDE, common_path
from toca_fx.graph.ops import PERMUTES, RESHAPES, SAME, activations, is_cheap
from toca_fx.graph.stream import Flow, passages, root, scales_of
from toca_fx.match.anchors import attention_at
from toca_fx.match.sites import OUTSIDE as OUTSIDE_BLOCKS
from toca_fx.match.sites import NearMiss, Site

_OTHER_VIEWS = RESHAPES | PERMUTES | SAME


@dataclass(frozen=True)
class Found:
    """A site, and the ``add`` of the residual stream that it ends in.

    ``sequence_first``: its attention runs along the first axis of its output, so that the second
    holds samples.
    """

    site: Site
    add: fx.Node
    sequence_first: bool = False


def residuals_behind(anchor: fx.Node, flow: Flow) -> list[fx.Node]:
    """The first adds downstream of ``anchor`` to a stream that it reads, within its block."""
    block = flow.block_of([anchor])
    found, seen, pending = [], set(), [anchor]
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen or flow.block_of([user]) not in (block, OUTSIDE):
                continue
            seen.add(user)
            if _adds_to_input(user, anchor, flow):
                found.append(user)
            else:
                pending.append(user)
    return sorted(found, key=flow.position.__getitem__)


def _adds_to_input(add: fx.Node, anchor: fx.Node, flow: Flow) -> bool:
    if add not in flow.residuals:
        return False
    stream, branch = flow.residuals[add]
    reads = flow.read_by(anchor, stream) is not None
    return reads and flow.reaches(anchor, branch) and not flow.reaches(anchor, stream)


def module_output(
    anchors: Sequence[fx.Node], add: fx.Node, flow: Flow, merges: Set[fx.Node] = frozenset()
) -> fx.Node:
    """The last node before the gates, on the way from ``anchors`` to ``add``.

    Where the way passes one of ``merges``, it is the node in front of the first of these.
    """
    branch = flow.residuals[add][1]
    ways = [flow.between(anchor, branch) for anchor in anchors if flow.reaches(anchor, branch)]
    region = sorted(set().union(*ways), key=flow.position.__getitem__)
    way = passages(region)
    at = next((at for at, node in enumerate(way) if node in merges), None)
    if at is not None:
        return way[at - 1]
    inside, output = set(region), branch
    inside = inside.union(*map(scales_of, anchors))  # they are part of the linear
    for before, after in zip(reversed(way[:-1]), reversed(way[1:]), strict=True):
        start, stop = flow.position[before], flow.position[after]
        step = [node for node in region if start < flow.position[node] <= stop]
        if not all(is_cheap(node) for node in step):
            break
        if any(
            operand not in inside and root(operand) not in inside
            for node in step
            for operand in activations(node)
        ):
            output = before
    return output


def in_a_row(output: fx.Node) -> Iterator[fx.Node]:
    """The nodes with three axes of which ``output``, an image, is another view, latest first.

    Streams can be images, and what is added to them made of tokens in a row.
    """
    node, users = output, 1
    while len(shape_of(output)) > 3 and users == 1 and node.target in _OTHER_VIEWS:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return
        node, users = source, len(source.users)
        if len(shape_of(node)) == 3 and users == 1:
            yield node


def site_at(
    kind: str, path: str, anchors: Sequence[fx.Node], output: fx.Node, add: fx.Node, flow: Flow
) -> Site | NearMiss:
    """The site of module ``path``, which its ``anchors`` lie in, or why it is none."""
    block, layer = flow.block_of(anchors)
    shape = tuple(getattr(output.meta["val"], "shape", ()))
    if layer is None:
        return NearMiss(kind, path, OUTSIDE_BLOCKS)
    if len(shape) != 3:
        return NearMiss(kind, path, f"its output has shape {shape}, not [batch, tokens, channels]")
    return Site(
        kind,
        path,
        layer,
        block,
        output.name,
        anchors[0].name,
        shape,
        residual=add.name,
        stream=flow.residuals[add][0].name,
    )


def unexplained(
    flow: Flow, found: Iterable[Found], misses: Iterable[NearMiss]
) -> Iterator[NearMiss]:
    """The residual branches in numbered blocks that no site and no near miss accounts for."""
    ends = {one.add for one in found}
    known = {miss.path for miss in misses}
    for add, (stream, branch) in flow.residuals.items():
        path = add.meta.get("path", "")
        if add in ends or flow.block_of([add]) == OUTSIDE:
            continue
        region = flow.between(flow.read_by(branch, stream) or root(stream), branch)
        heavy = [node for node in region if node.op == "call_function" and not is_cheap(node)]
        module = common_path(heavy) or path
        explained = any(other == module or other.startswith(f"{module}.") for other in known)
        if explained or any(attention_at(node) for node in region):
            continue
        products = ", ".join(sorted({str(node.target) for node in heavy}))
        reason = f"no softmax attention and no linear-activation-linear in it, but {products}"
        yield NearMiss("module", module, reason)
