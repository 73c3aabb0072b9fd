"""MLPs: linear -> activation -> linear, and which of them are sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx

from toca_fx.graph import tokenwise
from toca_fx.graph.modules import OUTSIDE, common_path
from toca_fx.graph.ops import (
    CONVOLUTIONS,
    NORMS,
    QUANTIZERS,
    REDUCTIONS,
    SCALES,
    activations,
    aten,
    is_activation,
    is_cheap,
    is_scale,
    linear_input,
    operands,
)
from toca_fx.graph.stream import Flow, scales_of
from toca_fx.graph.tokenwise import Tokens
from toca_fx.match.anchors import attention_at
from toca_fx.match.branches import Found, in_a_row, module_output, residuals_behind, site_at
from toca_fx.match.origins import projected, unshaped
from toca_fx.match.sites import NearMiss

# What may lie between the linears besides pointwise operators: norms, spelled out or not.
_INSIDE = CONVOLUTIONS | NORMS | REDUCTIONS
# What may be one for several tokens.
_OVER_AXES = NORMS | REDUCTIONS | SCALES | QUANTIZERS


@dataclass(frozen=True)
class Mlp:
    """linear -> activation -> linear.

    ``first`` are the linears in front of the activation, ``last`` those that read the activated
    features: one, or two where a low-rank pair is added to it. ``merge`` is the concatenation with
    an attention's output, if there is one.
    """

    first: tuple[fx.Node, ...]
    last: tuple[fx.Node, ...]
    merge: fx.Node | None


def mlps_of(graph: fx.Graph, flow: Flow) -> dict[fx.Node, Mlp]:
    """All MLPs, by the first of the linears that they end in.

    The embedders of timesteps and captions are among them.
    """
    readers: dict[fx.Node | None, list[Mlp]] = {}
    for node in graph.nodes:
        mlp = _mlp_ending_at(node, flow)
        if mlp is not None:
            readers.setdefault(unshaped(linear_input(node)), []).append(mlp)
    return {
        same[0].last[0]: replace(same[0], last=tuple(mlp.last[0] for mlp in same))
        for same in readers.values()
    }


def mlp_sites(mlp: Mlp, flow: Flow) -> Iterator[Found | NearMiss]:
    """The sites of an MLP, one per stream that its output is added to, or why there is none.

    An MLP that reads no residual stream, or is added to none outside of the blocks, is not even a
    near miss: embedders of timesteps and conditions, and output layers are such.
    """
    linears = [*mlp.first, *mlp.last]
    path = common_path(linears)
    if not flow.reads_a_stream(mlp.first[0]):
        return
    ends = residuals_behind(mlp.last[0], flow)
    gated = len({projected(linear) for linear in mlp.first}) != 1
    if flow.block_of(linears) == OUTSIDE and (gated or not ends):
        return
    if not ends:
        yield NearMiss("mlp", path, "its output is not added to the stream that it reads")
    elif gated:
        yield NearMiss("mlp", path, "the gated branches read different inputs")
    else:
        for add in ends:  # several, if streams are concatenated for it
            if any(attention_at(node) for node in flow.between(mlp.last[0], add)):
                continue  # it makes the queries of an attention, whose output is added
            output = module_output(mlp.last, add, flow)
            # Of an image, what it is made of, if that is the linear's [batch, tokens, channels].
            output = next((node for node in in_a_row(output) if node in mlp.last), output)
            if _is_channels_first(mlp, output):
                shape = tuple(output.meta["val"].shape)
                yield NearMiss(
                    "mlp", path, f"its output has shape {shape}: channels come before tokens"
                )
                continue
            site = site_at("mlp", path, linears, output, add, flow)
            if isinstance(site, NearMiss):
                yield site
                continue
            mixing = _mixing(mlp, output, flow)
            if mixing is not None:
                scales = " (one scale for all?)" if is_scale(mixing) else ""
                reason = f"{mixing.target} in it may mix tokens{scales}: none are chosen"
                yield NearMiss("mlp", path, f"{reason}, it is computed or reused as a whole")
            yield Found(replace(site, whole=mixing is not None), add)


def _mixing(mlp: Mlp, output: fx.Node, flow: Flow) -> fx.Node | None:
    """A norm or scale between the linears that may not be one of each token; None if all are."""
    shape = tuple(getattr(output.meta["val"], "shape", ()))
    if len(shape) != 3:
        return None
    begins = set(mlp.first).union(*map(scales_of, mlp.first))
    inside: set[fx.Node] = set()
    above = [output]
    while above:
        node = above.pop()
        # An attention beside the MLP has norms of its own.
        if node not in inside and attention_at(node) is None:
            inside.add(node)
            if node not in begins:
                above += [other for other in activations(node) if flow.reads_a_stream(other)]
    pending, seen = [(output, Tokens(shape[0], shape[1]))], set()
    while pending:
        node, where = pending.pop()
        if (node, where) not in seen and node in inside:
            seen.add((node, where))
            pending += (tokenwise.followed(node, where) or {}).items()
    per_token = {node for node, where in seen if tokenwise.followed(node, where) is not None}
    mixing = [node for node in inside if node.target in _OVER_AXES and node not in per_token]
    return min(mixing, key=flow.position.__getitem__, default=None)


def _is_channels_first(mlp: Mlp, output: fx.Node) -> bool:
    """Whether the output is that of a convolution as it is: its second axis has the channels."""
    last = mlp.last[0]
    return (
        last.target in CONVOLUTIONS
        and operands(output, 1) is None
        and operands(last, 1) is None
        and getattr(output.meta["val"], "shape", None) == last.meta["val"].shape
    )


def _mlp_ending_at(last: fx.Node, flow: Flow) -> Mlp | None:
    """The MLP that ends in the linear layer ``last``; None if none does.

    It is found by walking back, through pointwise operators, splits, norms and an activation, to
    earlier linear layers.
    """
    source = linear_input(last)
    if source is None:
        return None
    first: list[fx.Node] = []
    activated, attends, merge = False, False, None
    pending, seen = [source], {source}
    while pending:
        node = pending.pop()
        if attention_at(node) is not None:
            attends = True
            continue
        if linear_input(node) is not None:
            first.append(node)
            continue
        if node.op == "placeholder" or is_scale(node):
            continue
        if node.target is aten.cat.default:
            merge = node
        elif node in flow.residuals or not (
            is_cheap(node) or is_activation(node) or node.target in _INSIDE
        ):
            return None
        activated |= is_activation(node)
        fresh = [operand for operand in activations(node) if operand not in seen]
        seen.update(fresh)
        pending += fresh
    if not first or not activated or (attends and merge is None):
        return None
    first.sort(key=flow.position.__getitem__)
    return Mlp(tuple(first), (last,), merge if attends else None)
