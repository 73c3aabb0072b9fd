"""ToCa and the methods after it, written to be read: plain PyTorch; nothing is shared with toca_fx
but the policy data.

``walk`` goes through a model and hands over each attention and MLP as computed for all tokens, and
the state in front of the output layers. On a partial step only the chosen tokens of a module are
taken, the others are made of what is remembered: the last value, or a forecast from several. On a
step that runs no block the state is. That is the definition (method: Zou et al., ToCa, ICLR 2025,
section 3); it saves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.models import SmallModel
from tests.reference_forecast import History, Moment
from tests.reference_schedules import fresh_count, full_steps, skipped_steps
from tests.walks import Part, walk
from toca_fx.policy import WHOLE_GRAINS, Policy, SitePolicy

Choice = Mapping[str, Sequence[Sequence[int]]]  # site path -> per sample the chosen tokens
Measures = dict[str, Tensor]  # name in the policy's ``scores`` -> [B, N]


@dataclass
class _Site:
    """One module of one layer, on one stream of tokens: its policy, its schedule and its memory."""

    path: str
    layer: int
    stream: str
    policy: SitePolicy
    full_steps: set[int]
    always_full: bool
    outputs: History
    full: bool = True  # on this step
    skipped: bool = False  # it is not full, and no block runs on this step
    fresh: list[list[int]] = field(
        default_factory=list
    )  # per sample the tokens of this step: all of them if full
    stale: list[list[int]] = field(
        default_factory=list
    )  # per sample and token the steps since it was fresh
    memory: dict[str, Tensor] = field(default_factory=dict)  # [B, N, ...] each
    measures: Measures = field(default_factory=dict)  # what an attention told of the tokens

    @property
    def is_partial(self) -> bool:
        """Whether some of its tokens, chosen ones, are computed on this step."""
        return not (self.full or self.skipped) and self.policy.action.mode == "partial"

    def output(self, now: Moment, computed: Tensor) -> Tensor:
        """The fresh tokens' rows of ``computed``, and what is made of the others' earlier ones."""
        if self.skipped:
            return computed  # nobody reads it
        if self.full:
            self.outputs.add(now, computed)
            return computed
        rows, newest = self.outputs.at(now), self.outputs.values[-1].clone()
        for sample, tokens in enumerate(self.fresh):
            rows[sample, tokens] = newest[sample, tokens] = computed[sample, tokens]
        self.outputs.values[-1] = newest
        return rows

    def remember(self, name: str, computed: Tensor) -> Tensor:
        """The fresh tokens' rows of ``computed``, and the others' as they were."""
        rows = (
            self.memory[name].clone()
            if name in self.memory
            else torch.full_like(computed, torch.nan)
        )
        for sample, tokens in enumerate(self.fresh):
            rows[sample, tokens] = computed[sample, tokens]
        self.memory[name] = rows
        return rows


class ReferenceSampler:
    """One generation of ``model`` under ``policy``.

    ``choices[c]`` prescribes the tokens of call c (site path -> per sample the tokens); without it
    they are scored here, which random scores exclude. ``chosen[c]`` tells which they were, in
    descending score.
    """

    def __init__(
        self,
        model: SmallModel,
        policy: Policy,
        num_steps: int | None = None,
        choices: Sequence[Choice] | None = None,
    ) -> None:
        self.model, self.policy, self.choices = model, policy, choices
        self.total = policy.sampler.steps if num_steps is None else num_steps
        self.order = list(range(self.total))
        if policy.sampler.order == "descending":
            self.order.reverse()
        self.skipped = skipped_steps(policy, self.order, self.total)
        self.grids: dict[str, tuple[int, int]] = {}  # stream -> rows and columns of its tokens
        self.lost = False  # nothing may be read that was remembered: the next step is full
        self.whole = History.of(policy, self.total)
        self.chosen: list[dict[str, list[list[int]]]] = []
        self._sites: dict[str, _Site] = {}  # by path
        self._crossing: dict[tuple[int, str], _Site] = {}  # layer and stream -> its cross-attention
        self._judges: dict[
            tuple[int, str], tuple[_Site, Measures]
        ] = {}  # and its self- or joint attention, with what that told

    def step(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's output for the next step of the generation."""
        self.chosen.append({})
        self.now = Moment(len(self.chosen) - 1, float(t.flatten()[0]))
        if self.lost:
            for memory in (self.whole, *(site.outputs for site in self._sites.values())):
                memory.clear()
        output = walk(self, self.model, x, t, y)
        if self.policy.cache.grain == "output":
            output = self._remember_whole(output)
        self.lost = False
        # The choice is made before the step, so a renewed map serves from the next step on.
        for site in self._sites.values():
            if (site.layer, site.stream) in self._judges:
                attention, measures = self._judges[site.layer, site.stream]
                if (site if attention.always_full else attention).full:
                    site.measures = measures
        return output

    def mlp(self, path: str, layer: int, stream: str, computed: Tensor) -> Tensor:
        """What an MLP contributes to its stream."""
        return self._site("mlp", path, layer, stream, computed).output(self.now, computed)

    def state(self, computed: Tensor) -> Tensor:
        """What the output layers read: as computed, or as remembered where no block runs."""
        return computed if self.policy.cache.grain == "output" else self._remember_whole(computed)

    def _remember_whole(self, computed: Tensor) -> Tensor:
        if self.order[self.now.call] in self.skipped and not self.lost:
            return self.whole.at(self.now)
        self.whole.add(self.now, computed)
        return computed

    def attention(self, kind: str, layer: int, parts: Sequence[Part]) -> list[Tensor]:
        """What an attention contributes to each of its streams."""
        sites = [self._site(kind, part.path, layer, part.stream, part.query) for part in parts]
        keys, values = [part.key for part in parts], [part.value for part in parts]
        if kind != "cross_attention":
            kept = [
                (site.remember("key", part.key), site.remember("value", part.value))
                for site, part in zip(sites, parts, strict=True)
            ]
            # Fresh queries see the stale tokens as they were. Where no stream is partial, an
            # attention that runs at all runs whole.
            if any(site.is_partial for site in sites):
                keys, values = [key for key, _ in kept], [value for _, value in kept]
        query, key, value = (
            torch.cat(tensors, dim=1).transpose(1, 2)
            for tensors in ([part.query for part in parts], keys, values)
        )
        weights = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(query.shape[3]), dim=3)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        mean = weights.mean(dim=1)
        outputs, end = [], 0
        for site, part in zip(sites, parts, strict=True):
            start, end = end, end + part.query.shape[1]
            outputs.append(site.output(self.now, part.project(mixed[:, start:end])))
            if kind == "cross_attention":
                site.remember("map", mean)
                self._crossing[layer, part.stream] = site
            else:
                self._judges[layer, part.stream] = (
                    site,
                    {
                        "self_attention": _unit(mean.sum(dim=1)[:, start:end]),
                        "value_norm": _unit(part.value.norm(dim=3).mean(dim=2)),
                        "key_norm": _unit(part.key.norm(dim=3).mean(dim=2)),
                        "small_values": _unit((1 - part.value.norm(dim=3)).sum(dim=2)),
                    },
                )
        return outputs

    def _site(self, kind: str, path: str, layer: int, stream: str, like: Tensor) -> _Site:
        """The site on this step, its fresh tokens chosen."""
        batch, count = like.shape[:2]
        s = self.order[self.now.call]
        if path not in self._sites:
            own = self.policy.for_site(kind, path, layer)
            computed = own.action.mode == "compute" or self.policy.cache.grain in WHOLE_GRAINS
            steps = set(self.order) if computed else full_steps(own.N, self.order, self.total)
            self._sites[path] = _Site(
                path,
                layer,
                stream,
                own,
                steps,
                steps | self.skipped == set(self.order),
                History.of(own, self.total),
                stale=[[0] * count for _ in range(batch)],
            )
        site = self._sites[path]
        site.full = s in site.full_steps or self.lost
        site.skipped = s in self.skipped and not site.full
        if site.full:
            site.fresh = [list(range(count)) for _ in range(batch)]
        elif site.is_partial:
            site.fresh = self.chosen[-1][path] = self._choose(site, s)
        else:
            site.fresh = [[] for _ in range(batch)]
        if site.skipped:
            return site  # nothing becomes staler
        for sample, fresh in enumerate(site.fresh):
            site.stale[sample] = [
                0 if token in fresh else missed + 1
                for token, missed in enumerate(site.stale[sample])
            ]
        return site

    def _choose(self, site: _Site, s: int) -> list[list[int]]:
        if self.choices is not None:
            return [list(tokens) for tokens in self.choices[len(self.chosen) - 1][site.path]]
        weights = site.policy.scores
        assert not weights.random, "random numbers cannot be repeated here; give choices"
        score = (
            weights.staleness
            / (weights.staleness_over or site.policy.N.base)
            * torch.tensor(site.stale, dtype=torch.float64)
        )
        for name, values in site.measures.items():
            score = score + getattr(weights, name) * values
        crossing = self._crossing.get((site.layer, site.stream))
        text_map = None if crossing is None else crossing.memory["map"]
        if self.policy.guidance.selection == "shared":
            half = len(score) // 2
            score = ((score[:half] + score[half:]) / 2).repeat(2, 1)
            if text_map is not None:  # the two halves' texts as one
                text_map = torch.cat([text_map[:half] / 2, text_map[half:] / 2], dim=2).repeat(
                    2, 1, 1
                )
        if text_map is not None:
            score = score + weights.cross_attention * _unit(
                1 - (text_map * torch.log(text_map + 1e-7)).sum(dim=2)
            )
        rows: list[list[float]] = score.tolist()
        if site.policy.spatial is not None:
            grid = self.grids[site.stream]
            rows = [
                bonus_by_hand(row, grid, site.policy.spatial.grid, site.policy.spatial.bonus)
                for row in rows
            ]
        last_layer = max(other.layer for other in self._sites.values())
        count = fresh_count(site.policy, s, self.total, site.layer, last_layer, score.shape[1])
        return [
            sorted(range(len(row)), key=lambda token: (-row[token], token))[:count] for row in rows
        ]


def _unit(score: Tensor) -> Tensor:
    """[B, N] with length 1 over the tokens."""
    return score / score.square().sum(dim=1, keepdim=True).sqrt()


def bonus_by_hand(
    row: Sequence[float], grid: tuple[int, int], block: int, bonus: float
) -> list[float]:
    """One sample's scores after the spatial bonus: in each block of the grid the first best token
    gains.
    """
    rows, columns = grid
    result = list(row)
    for top in range(0, rows, block):
        for left in range(0, columns, block):
            members = [
                r * columns + c
                for r in range(top, min(top + block, rows))
                for c in range(left, min(left + block, columns))
            ]
            best = max(members, key=lambda token: (row[token], -token))
            result[best] = row[best] + row[best] * bonus
    return result
