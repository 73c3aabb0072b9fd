"""Pass: attentions give scores of their tokens, on the steps that compute them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.graph.ops import aten
from toca_fx.kernels.influence import of_segment
from toca_fx.kernels.scores import OF_ATTENTION, OfAttention
from toca_fx.match.anchors import attention_at
from toca_fx.match.fused import Attention
from toca_fx.plan.buffers import READ, Buffer
from toca_fx.plan.scores import INSIDE
from toca_fx.plan.step import AttentionScore
from toca_fx.rewrite.draft import Draft
from toca_fx.rewrite.report import PassReport


def score_attentions(draft: Draft) -> PassReport:
    """Put the entropies and base scores that this kind of step renews into the graph.

    Scores are written to their buffers; entropies are left to ``keep_features``.
    """
    before = len(draft.graph.nodes)
    spec = draft.spec
    attentions = _Attentions(draft)
    for i in spec.entropies:
        # The entropies of the two halves of a guidance batch then sum to that of both maps.
        share = 0.5 if spec.shared else 1.0
        draft.entropies[i] = attentions.score(i, INSIDE, {"share": share})
    for score in spec.scores:
        draft.write(Buffer("score", score.site), _base_score(draft, attentions, score))
    sites = (*spec.entropies, *(score.site for score in spec.scores))
    return PassReport("scores of attention", sites, nodes=len(draft.graph.nodes) - before)


def _base_score(draft: Draft, attentions: _Attentions, score: AttentionScore) -> fx.Node:
    """The weighted sum of the scores of a site's tokens, [B, N]; each is normalised."""
    site, source = draft.spec.sites[score.site], draft.spec.sites[score.attention]
    segment = functools.partial(of_segment, start=source.segment or 0, count=site.tokens)
    total: fx.Node | None = None
    weights = dict(score.weights)
    for name in (name for name in OF_ATTENTION if name in weights):
        found = attentions.score(score.attention, name, {"every": score.every})
        with draft.graph.inserting_before(draft.end):
            own = draft.fragments.inline(segment, (found,))
            scaled = draft.graph.call_function(aten.mul.Tensor, (own, weights[name]))
            scaled.meta["val"] = own.meta["val"]
            if total is not None:
                scaled = draft.graph.call_function(aten.add.Tensor, (total, scaled))
                scaled.meta["val"] = own.meta["val"]
        total = scaled
    if total is None:
        raise AssertionError("plan.step lists sites with a score of attention only")
    return total


class _Attentions:
    """The attentions of a draft as they were found.

    Each score is computed once, even if several sites use it.
    """

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._found: dict[str, Attention | None] = {
            site.anchor: attention_at(draft.nodes[site.anchor])
            for site in draft.spec.sites
            if site.kind != "mlp"
        }

    def score(self, site: int, name: str, options: Mapping[str, Any]) -> fx.Node:
        """A score of the keys, or of the queries, of the attention of a site; [B, M]."""
        draft, source = self._draft, self._draft.spec.sites[site]
        attention, formula = self._found[source.anchor], OF_ATTENTION[name]
        if attention is None:
            raise AssertionError(f"{source.anchor} is no attention")
        if (source.anchor, name) not in draft.scores:
            given: dict[str, Any] = {option: options[option] for option in formula.options}
            plain = attention.output.target is aten.scaled_dot_product_attention.default
            if plain and formula.attention is not None:
                function = functools.partial(formula.attention, **given)
                found = self._replace(source.anchor, attention, function, formula.skippable)
            else:
                samples = 1 if source.packed else source.shape[0]
                found = self._beside(attention, samples, formula, given)
            if source.packed:
                found = self._apart(found, attention, source.shape[0])
            draft.scores[source.anchor, name] = found
        return draft.scores[source.anchor, name]

    def _replace(
        self, anchor: str, attention: Attention, function: Callable[..., Any], may_skip: bool
    ) -> fx.Node:
        """Replace an attention by ``function``, which returns output and score.

        It takes what the attention takes; on a GPU it ``may_skip`` a score that is not used.
        """
        draft, output = self._draft, attention.output
        further = {"read": self._is_read(output)} if may_skip and _on_gpu(output) else {}
        score: fx.Node
        with draft.graph.inserting_before(output):
            new, score = draft.fragments.inline(function, output.args, {**output.kwargs, **further})
        output.replace_all_uses_with(new)
        if draft.nodes[anchor] is output:  # the cached output itself, if no projection follows
            draft.nodes[anchor] = new
        return score

    def _apart(self, score: fx.Node, attention: Attention, batch: int) -> fx.Node:
        """A score [1, B * M] of a map that all samples share as [B, M]."""
        value: Tensor = score.meta["val"]
        sizes = (batch, value.shape[1] // batch)
        with self._draft.graph.inserting_before(attention.output):
            apart = self._draft.graph.call_function(aten.view.default, (score, list(sizes)))
        apart.meta["val"] = value.new_empty(sizes)
        return apart

    def _is_read(self, attention: fx.Node) -> fx.Node:
        """The input that says whether the scores of this step will be used.

        It is on the CPU, where reading it does not wait for the device.
        """
        node = self._draft.buffer(READ)
        value: Tensor = attention.meta["val"]
        node.meta["val"] = value.new_zeros((), dtype=torch.bool, device="cpu")
        return node

    def _beside(
        self, attention: Attention, batch: int, formula: OfAttention, options: Mapping[str, Any]
    ) -> fx.Node:
        """Compute a score beside an attention that stays as it is.

        It is made of the map, if the graph has it, or else of operands.
        """
        of_map = attention.weights is not None and formula.of_map is not None
        reads = ("weights",) if of_map else formula.reads
        score = functools.partial(
            _score_beside,
            formula=formula,
            of_map=of_map,
            heads=_Heads(attention.layout, batch),
            # A key that is multiplied explicitly is transposed.
            transposed=tuple(name == "key" and attention.weights is not None for name in reads),
            scale=attention.scale,
            options=tuple(options.items()),
        )
        nodes = tuple(getattr(attention, name) for name in reads)
        with self._draft.graph.inserting_before(attention.output):
            return self._draft.fragments.inline(score, nodes)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Heads:
    """How the operands of an attention lie, and of how many samples."""

    layout: str
    batch: int

    def apart(self, operand: Tensor, transposed: bool) -> Tensor:
        """An operand as [B, heads, tokens, width]."""
        if self.layout == "bnhd":
            return operand.transpose(1, 2)
        operand = operand.transpose(-1, -2) if transposed else operand
        is_apart = operand.dim() == 4
        return operand if is_apart else operand.reshape(self.batch, -1, *operand.shape[1:])


def _score_beside(
    *operands: Tensor,
    formula: OfAttention,
    of_map: bool,
    heads: _Heads,
    transposed: tuple[bool, ...],
    scale: float | None,
    options: tuple[tuple[str, Any], ...],
) -> Tensor:
    """A score of the map or the operands of an attention."""
    shaped = list(map(heads.apart, operands, transposed))
    if of_map and formula.of_map is not None:
        return formula.of_map(*shaped, **dict(options))
    default = shaped[0].shape[-1] ** -0.5 if scale is None else scale
    return formula.formula(*shaped, *([default] if formula.scaled else []), **dict(options))


def _on_gpu(node: fx.Node) -> bool:
    return bool(node.meta["val"].device.type == "cuda")
