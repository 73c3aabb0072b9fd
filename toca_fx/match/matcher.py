"""Find attention and MLP modules in a pre-dispatch ATen graph. Pure: nothing is changed.

A match starts at an anchor, an attention or the last linear of linear -> activation -> linear, and
follows its output to the residual stream:

    stream + gate(timestep) * module(norm(stream))

It counts as a site only if the add is there, inside a numbered block, and the stream that is added
to is one that the module reads. So timestep embedders and caption projections are not sites. What
is cached is the module's output before the gate, because the gate depends on the timestep (ToCa,
section 3): behind the output projection and any norm, in front of the first operator that brings in
something else.

Joint attention over two streams is two sites, one per stream. Where attention and MLP share their
output projection (the parallel blocks of FLUX), the MLP's output is that of the projection, and the
attention's what it hands to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx

from toca_fx.graph import ops
from toca_fx.graph.modules import common_path, numbered_block
from toca_fx.graph.ops import (
    CONVOLUTIONS,
    activations,
    aten,
    is_activation,
    is_cheap,
    is_constant,
    linear_input,
)
from toca_fx.graph.stream import Flow, passages, root
from toca_fx.match.anchors import Attention, attention_at
from toca_fx.match.origins import (
    attention_kind,
    is_sequence_first,
    projected,
    projections_of,
    same_tokens,
    segment_of,
    unshaped,
)
from toca_fx.match.sites import Matches, NearMiss, Site


def match(graph: fx.Graph) -> Matches:
    """Match every attention and MLP of ``graph``, which comes from ``trace.to_aten``."""
    return _Matcher(graph).run()


@dataclass(frozen=True)
class _Mlp:
    """linear -> activation -> linear. ``merge`` is the concatenation with an attention's output, if
    there is one.

    ``last`` are the linears that read the activated features: one, or two where a low-rank pair is
    added to it.
    """

    first: tuple[fx.Node, ...]
    last: tuple[fx.Node, ...]
    merge: fx.Node | None


@dataclass(frozen=True)
class _Found:
    """A site, and the add of the residual stream that it ends in."""

    site: Site
    add: fx.Node


class _Matcher:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.flow = graph, Flow(graph)
        self.found: list[_Found] = []
        self.misses: list[NearMiss] = []
        self.sequence_first: set[tuple[str, int, tuple[int, ...]]] = set()

    def run(self) -> Matches:
        ending = {
            node: mlp for node in self.graph.nodes if (mlp := self._mlp_ending_at(node)) is not None
        }
        readers: dict[fx.Node | None, list[_Mlp]] = {}
        for node, mlp in ending.items():
            readers.setdefault(unshaped(linear_input(node)), []).append(mlp)
        mlps = {
            same[0].last[0]: replace(same[0], last=tuple(mlp.last[0] for mlp in same))
            for same in readers.values()
        }
        merges = {mlp.merge for mlp in mlps.values() if mlp.merge is not None}
        for node in self.graph.nodes:
            attention = attention_at(node)
            if attention is not None:
                self._attention(attention, merges)
            elif node in mlps:
                self._mlp(mlps[node])
        self._rest()
        self._drop_sequence_first()
        return Matches(tuple(self._judged()), tuple(self.misses))

    def _attention(self, attention: Attention, merges: set[fx.Node]) -> None:
        node = attention.output
        kind = attention_kind(attention)
        if kind is None:
            learnt = is_constant(attention.query)
            reason = (
                "its query is learnt, not made from a stream"
                if learnt
                else "query or key does not come from a linear projection"
            )
            self._miss("attention", node.meta["path"], reason)
            return
        ends = self._residuals_behind(node)
        if not ends:
            self._miss(
                kind, node.meta["path"], "its output is not added to the stream that it reads"
            )
        for add in ends:
            output = self._module_output((node,), self.flow.residuals[add][1], merges)
            path = node.meta["path"] if len(ends) == 1 else output.meta["path"]
            site = self._site(kind, path, node, output, add)
            if site is None:
                continue
            if is_sequence_first(attention, output, site.shape, self.flow):
                self.sequence_first.add((site.block, site.layer, site.shape[:2]))
            segment = segment_of(attention, output, site.shape, self.flow)
            projections: tuple[str, ...] = ()
            if (
                segment is not None
                and kind != "cross_attention"
                and not same_tokens(attention, site.shape, segment)
            ):
                site, segment = replace(site, segment=None), None
            if segment is not None and kind != "cross_attention":
                projections = projections_of(attention, site.shape, segment, self.flow)
            self.found.append(_Found(replace(site, segment=segment, projections=projections), add))

    def _mlp(self, mlp: _Mlp) -> None:
        path = common_path([*mlp.first, *mlp.last])
        if numbered_block(path)[1] is None or not self.flow.reads_a_stream(mlp.first[0]):
            return  # embedders of timesteps and conditions are linear-activation-linear, too
        inputs = {projected(linear) for linear in mlp.first}
        ends = self._residuals_behind(mlp.last[0])
        if not ends:
            self._miss("mlp", path, "its output is not added to the stream that it reads")
        elif len(inputs) != 1:
            self._miss("mlp", path, "the gated branches read different inputs")
        else:
            for add in ends:  # several, if streams are concatenated for it
                output = self._module_output(mlp.last, self.flow.residuals[add][1], set())
                if (
                    mlp.last[0].target in CONVOLUTIONS
                    and ops.operands(output, 1) is None
                    and ops.operands(mlp.last[0], 1) is None
                ):
                    shape = tuple(getattr(output.meta["val"], "shape", ()))
                    if shape == tuple(mlp.last[0].meta["val"].shape):
                        self._miss(
                            "mlp",
                            path,
                            f"its output has shape {shape}: channels come before tokens",
                        )
                        continue
                site = self._site("mlp", path, mlp.first[0], output, add)
                if site is not None:
                    self.found.append(_Found(site, add))

    def _site(
        self, kind: str, path: str, anchor: fx.Node, output: fx.Node, add: fx.Node
    ) -> Site | None:
        block, layer = numbered_block(path)
        shape = getattr(output.meta["val"], "shape", ())
        if layer is None:
            self._miss(
                kind, path, "it lies outside the numbered blocks (no index in its module path)"
            )
        elif len(shape) != 3:
            self._miss(
                kind, path, f"its output has shape {tuple(shape)}, not [batch, tokens, channels]"
            )
        elif any(other.site.output == output.name for other in self.found):
            return None  # two attentions summed before one projection are one site
        else:
            stream = self.flow.residuals[add][0]
            return Site(
                kind,
                path,
                layer,
                block,
                output.name,
                anchor.name,
                tuple(shape),
                residual=add.name,
                stream=stream.name,
            )
        return None

    def _residuals_behind(self, anchor: fx.Node) -> list[fx.Node]:
        """The first adds downstream of ``anchor`` to a stream that it reads, within its block."""
        block = numbered_block(anchor.meta["path"])
        found, seen, pending = [], set(), [anchor]
        while pending:
            node = pending.pop()
            for user in node.users:
                other = numbered_block(user.meta.get("path", ""))
                if user in seen or other not in (block, ("", None)):
                    continue
                seen.add(user)
                if self._adds_to_input(user, anchor):
                    found.append(user)
                else:
                    pending.append(user)
        return sorted(found, key=self.flow.position.__getitem__)

    def _adds_to_input(self, add: fx.Node, anchor: fx.Node) -> bool:
        if add not in self.flow.residuals:
            return False
        stream, branch = self.flow.residuals[add]
        reads = self.flow.read_by(anchor, stream) is not None
        return reads and self.flow.reaches(anchor, branch) and not self.flow.reaches(anchor, stream)

    def _module_output(
        self, anchors: tuple[fx.Node, ...], branch: fx.Node, merges: set[fx.Node]
    ) -> fx.Node:
        """The last node before the gates, on the way from ``anchors`` to ``branch``, which is added
        to the stream.
        """
        ways = [
            self.flow.between(anchor, branch)
            for anchor in anchors
            if self.flow.reaches(anchor, branch)
        ]
        region = sorted(set().union(*ways), key=self.flow.position.__getitem__)
        way = passages(region)
        at = next((at for at, node in enumerate(way) if node in merges), None)
        if at is not None:
            return way[at - 1]
        inside, output = set(region), branch
        for before, after in zip(reversed(way[:-1]), reversed(way[1:]), strict=True):
            start, stop = self.flow.position[before], self.flow.position[after]
            step = [node for node in region if start < self.flow.position[node] <= stop]
            if not all(is_cheap(node) for node in step):
                break
            if any(operand not in inside for node in step for operand in activations(node)):
                output = before
        return output

    def _mlp_ending_at(self, last: fx.Node) -> _Mlp | None:
        """Walk back from a linear layer, through pointwise operators, splits and an activation, to
        earlier ones.
        """
        source = linear_input(last)
        if source is None:
            return None
        first: list[fx.Node] = []
        activated, attends, merge = False, False, None
        pending, seen = [source], {source}
        while pending:
            node = pending.pop()
            if linear_input(node) is not None:
                first.append(node)
                continue
            if attention_at(node) is not None:
                attends = True
                continue
            if node.op == "placeholder":
                continue
            if node.target is aten.cat.default:
                merge = node
            elif node in self.flow.residuals or not (
                is_cheap(node) or node.target in CONVOLUTIONS or node.target is aten.glu.default
            ):
                return None
            activated |= is_activation(node) or node.target is aten.glu.default
            fresh = [operand for operand in activations(node) if operand not in seen]
            seen.update(fresh)
            pending += fresh
        if not first or not activated or (attends and merge is None):
            return None
        return _Mlp(
            tuple(sorted(first, key=self.flow.position.__getitem__)),
            (last,),
            merge if attends else None,
        )

    def _rest(self) -> None:
        """Residual branches in numbered blocks that nothing was found in."""
        ends = {found.add for found in self.found}
        known = {miss.path for miss in self.misses}
        for add, (stream, branch) in self.flow.residuals.items():
            path = add.meta.get("path", "")
            if add in ends or numbered_block(path)[1] is None:
                continue
            region = self.flow.between(self.flow.read_by(branch, stream) or root(stream), branch)
            heavy = [node for node in region if node.op == "call_function" and not is_cheap(node)]
            place = common_path(heavy) or path
            explained = any(other == place or other.startswith(f"{place}.") for other in known)
            if not explained and not any(attention_at(node) for node in region):
                products = sorted({str(node.target) for node in heavy})
                self._miss(
                    "module",
                    place,
                    f"no softmax attention and no linear-activation-linear in it, but {', '.join(products)}",
                )

    def _drop_sequence_first(self) -> None:
        """Where attention runs along the first axis, the second holds samples: no tokens to choose
        among.
        """
        kept = []
        for found in self.found:
            site = found.site
            if (site.block, site.layer, site.shape[:2]) in self.sequence_first:
                self._miss(
                    site.kind,
                    site.path,
                    f"its output has shape {site.shape}: [tokens, batch, channels], not [batch, tokens, channels]",
                )
            else:
                kept.append(found)
        self.found = kept

    def _judged(self) -> Iterator[Site]:
        """The sites, each with the attentions whose maps tell about its tokens."""
        streams = {found.add: self.flow.residuals[found.add][0] for found in self.found}
        for index, found in enumerate(self.found):
            chain = {found.add}
            node = root(streams[found.add])
            while node in streams:
                chain.add(node)
                node = root(streams[node])
            peers = [
                at
                for at, other in enumerate(self.found)
                if other.site.segment is not None
                and (other.site.block, other.site.layer) == (found.site.block, found.site.layer)
                and other.site.shape[:2] == found.site.shape[:2]
            ]
            # On the same stream first; then what ran before, nearest first.
            peers.sort(
                key=lambda at: (self.found[at].add not in chain, at > index, abs(at - index))
            )
            crossing = [at for at in peers if self.found[at].site.kind == "cross_attention"]
            mutual = [
                at for at in peers if self.found[at].site.kind != "cross_attention" and at <= index
            ]
            yield replace(
                found.site,
                influence=mutual[0] if mutual else None,
                entropy=crossing[0] if crossing else None,
                follows=self._followed(index),
            )

    def _followed(self, index: int) -> int | None:
        """The site that ``follows`` is to name for the site at ``index``."""
        add = self.found[index].add
        stream = self.flow.residuals[add][0]
        for at in reversed(range(index)):
            other = self.found[at]
            if (other.site.block, other.site.layer) == (
                self.found[index].site.block,
                self.found[index].site.layer,
            ):
                if other.add is add:
                    return at if self._joins_sites_only(add) else None
                if other.add is stream:
                    region = {*self.flow.between(stream, add)}
                    alone = all(user in region for node in region - {add} for user in node.users)
                    return (
                        at
                        if alone and self._joins_sites_only(add) and self._joins_sites_only(stream)
                        else None
                    )
        return None

    def _joins_sites_only(self, add: fx.Node) -> bool:
        """Whether all work between a stream and what ``add`` makes of it belongs to sites."""
        stream, branch = self.flow.residuals[add]
        region = self.flow.between(self.flow.read_by(branch, stream) or root(stream), branch)
        names = {found.site.output for found in self.found if found.add is add}
        outputs = [node for node in region if node.name in names]
        return all(
            is_cheap(node) or any(self.flow.reaches(node, output) for output in outputs)
            for node in region
        )

    def _miss(self, kind: str, path: str, reason: str) -> None:
        self.misses.append(NearMiss(kind, path, reason))
