"""What every site does on every step, as plain data. Nothing is traced or run.

A site's *mode* on a step is one of

    full      computed for all tokens; its output is written to the cache
    partial   computed for K fresh tokens; the others come from the cache
    reuse     taken from the cache whole
    skip      not needed: no block runs, the state in front of the output layers is in its memory
    compute   computed for all tokens and never cached (the policy says so, or no later step would
              read the cache)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from toca_fx.match.sites import Site
from toca_fx.plan import scores
from toca_fx.plan.buffers import Buffer, memory
from toca_fx.plan.forecast import history
from toca_fx.plan.grids import SpatialBonus
from toca_fx.plan.schedule import Modes
from toca_fx.plan.step import AttentionScore, Selection, StepSpec
from toca_fx.plan.times import Noise
from toca_fx.plan.units import count_whole
from toca_fx.policy import Forecast, Gate, SitePolicy

KINDS = ("full", "mixed", "partial", "skip")
"""The kinds of steps, by work."""

_RUNS = ("full", "partial", "compute")


@dataclass(frozen=True)
class StepPlan:
    """One step, with a mode and a K per site.

    ``index`` is s of the paper, which counts down for ``order: descending``. ``fresh[i]`` is the
    number of tokens per sample that site i computes: all for full and compute, 0 for reuse.
    ``read`` says whether a later step chooses by the scores of attention that this one renews. The
    last ``whole`` sites are the whole model.
    """

    index: int
    modes: Modes
    fresh: tuple[int, ...]
    read: bool = True
    whole: int = 0

    @property
    def kind(self) -> str:
        """See ``kind_of``."""
        return kind_of(self.modes, self.whole)


def kind_of(modes: Modes, whole: int = 0) -> str:
    """The kind of a step whose sites are in ``modes``, of which the last are the ``whole`` model.

    It is ``skip`` if no block runs, ``full`` if no module reads its cache, ``partial`` if no cached
    module is computed whole, else ``mixed``.
    """
    modules = modes[: len(modes) - whole]
    if "skip" in modules or "reuse" in modes[len(modules) :]:
        return "skip"
    cached = {mode for mode in modules if mode != "compute"}
    if cached <= {"full"}:
        return "full"
    return "mixed" if "full" in cached else "partial"


class Timeline(NamedTuple):
    """Sites whose histories are written on the same steps, and read by the same ``forecast``."""

    sites: tuple[int, ...]
    forecast: Forecast


@dataclass(frozen=True)
class Settings:
    """What a policy says of whole generations.

    ``steps`` is the number that it was tuned for, and ``scales`` says that it is for any other too.
    ``shared`` says that both halves of a batch share one selection of tokens (in those of a plan:
    and that it has two halves), ``separate`` that guidance branches are called one after the other.
    ``noise`` is how timesteps are levels of noise. ``gate`` decides on the steps that are not
    full in a plan; without a bound it may let any number of them be.
    """

    policy: str
    steps: int
    seed: int
    shared: bool
    separate: bool
    hoisting_bytes: int
    recording_bytes: int
    scales: bool = False
    noise: Noise | None = None
    gate: Gate | None = None


@dataclass(frozen=True)
class Plan:
    """What each site does on each step.

    ``policies[i]`` is the policy of ``sites[i]``, among which are the states of the model where
    steps are skipped; ``steps`` are in the order of the calls, and where there is a gate they are
    as it may leave them; ``spatial[i]`` is the bonus of a site that selects tokens.
    """

    sites: tuple[Site, ...]
    policies: tuple[SitePolicy, ...]
    steps: tuple[StepPlan, ...]
    settings: Settings
    spatial: tuple[SpatialBonus | None, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def full_modes(self) -> Modes:
        """The modes of a full step: every site that is ever cached is written."""
        return self.steps[0].modes

    @cached_property
    def whole(self) -> int:
        """How many of the sites, the last ones, are the whole model."""
        return count_whole(self.sites)

    @cached_property
    def cached(self) -> tuple[int, ...]:
        """Indices of the sites that have a cache."""
        return tuple(i for i, mode in enumerate(self.full_modes) if mode == "full")

    @cached_property
    def scored(self) -> tuple[int, ...]:
        """Indices of the sites that select tokens on some step."""
        partial = {i for step in self.steps for i, m in enumerate(step.modes) if m == "partial"}
        return tuple(i for i in self.cached if i in partial)

    @cached_property
    def scored_by_attention(self) -> tuple[int, ...]:
        """Indices of the scored sites whose score is made of queries, keys or values."""
        return tuple(
            i
            for i in self.scored
            if scores.weights(self.policies[i].scores, "full")
            and self.sites[i].influence is not None
        )

    @cached_property
    def entropies(self) -> tuple[int, ...]:
        """Indices of the cross-attentions whose entropy some site selects by."""
        sources = {self.entropy_sources[i] for i in self.scored}
        return tuple(sorted(source for source in sources if source is not None))

    @cached_property
    def entropy_sources(self) -> tuple[int | None, ...]:
        """By site, the cross-attention by whose entropy it selects, if it does."""
        weighed = zip(self.sites, self.entropy_weights, strict=True)
        return tuple(site.entropy if weight else None for site, weight in weighed)

    @cached_property
    def entropy_weights(self) -> tuple[float, ...]:
        """By site, the weight of its score that is made of a cross-attention's entropy."""
        return tuple(policy.scores.weights.get(scores.INSIDE, 0.0) for policy in self.policies)

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """By site, the dtype of the features that it keeps: "model" or a name in torch."""
        return tuple(policy.cache.dtype for policy in self.policies)

    def weights_ahead(self, site: int) -> dict[str, float]:
        """The weights of a site's scores that are known ahead of a step.

        That of staleness is divided by N0.
        """
        policy = self.policies[site]
        found = dict(scores.weights(policy.scores, "ahead"))
        if "staleness" in found:
            found["staleness"] /= policy.scores.staleness_over or policy.N.base
        return found

    @cached_property
    def remembering(self) -> tuple[int, ...]:
        """Indices of the self- and joint attentions that keep keys and values.

        They do if queries are computed for fresh tokens only.
        """
        sites = self.sites
        anchors = {sites[i].anchor for i in self.scored if sites[i].projections}
        return tuple(i for i in self.cached if sites[i].anchor in anchors and sites[i].projections)

    @cached_property
    def runs(self) -> tuple[tuple[int, ...], ...]:
        """The sites of a block that share a cache, that of the first one.

        They follow each other, and are always reused together.
        """
        runs: dict[int, list[int]] = {}
        head: dict[int, int] = {}
        for i, site in enumerate(self.sites):
            if site.follows is not None and self._reused_with(site.follows, i):
                first = head[i] = head.get(site.follows, site.follows)
                runs.setdefault(first, [first]).append(i)
        return tuple(tuple(run) for run in runs.values() if self._is_whole(run))

    def _is_whole(self, run: Sequence[int]) -> bool:
        """Whether no other site adds to the stream where those of ``run`` do."""
        ends = {self.sites[i].residual for i in run}
        return all(i in run for i, site in enumerate(self.sites) if site.residual in ends)

    def _reused_with(self, one: int, other: int) -> bool:
        together = all(
            step.modes[one] == step.modes[other] in ("full", "reuse") for step in self.steps
        )
        cache, forecast = self.policies[one].cache, self.policies[one].forecast
        same = (cache, forecast) == (self.policies[other].cache, self.policies[other].forecast)
        return together and same and cache.grain == "block" and one in self.cached

    @cached_property
    def fewest(self) -> tuple[StepPlan, ...]:
        """The steps with as few full ones as a gate can leave; without one, those there are."""
        gate = self.settings.gate
        if gate is None or gate.at_most is None:
            return self.steps
        found, since = list[StepPlan](), 0
        for at, planned in enumerate(self.steps):
            due = since >= gate.at_most and planned.kind != "full"
            step = self.full_step(at) if due else planned
            since = 0 if step.kind == "full" else since + 1
            found.append(step)
        return tuple(found)

    @cached_property
    def full_range(self) -> tuple[int, int]:
        """How many steps are full at least, and at most; one number but for a gate."""
        fewest = sum(step.kind == "full" for step in self.fewest)
        return fewest, fewest if self.settings.gate is None else len(self.steps)

    @cached_property
    def histories(self) -> tuple[int, ...]:
        """By site, how many of its values it keeps; 0 for one without a cache."""
        gated = self.settings.gate is not None
        return tuple(
            history(
                self.policies[i].forecast,
                sum(gated or step.modes[i] == "full" for step in self.steps),
            )
            if i in self.cached
            else 0
            for i in range(len(self.sites))
        )

    @cached_property
    def timelines(self) -> tuple[Timeline, ...]:
        """The histories of all sites. Of sites that share a cache it is the first that has it."""
        shared = {i for run in self.runs for i in run[1:]}
        found: dict[tuple[Forecast, tuple[bool, ...]], list[int]] = {}
        for i, kept in enumerate(self.histories):
            if kept > 1 and i not in shared:
                written = tuple(step.modes[i] == "full" for step in self.steps)
                found.setdefault((self.policies[i].forecast, written), []).append(i)
        return tuple(Timeline(tuple(sites), own) for (own, _), sites in found.items())

    @cached_property
    def kept(self) -> tuple[Buffer, ...]:
        """The buffers that a generation keeps from step to step."""
        shared = {i for run in self.runs for i in run[1:]}
        return (
            *(
                buffer
                for i in self.cached
                if i not in shared
                for buffer in memory(i, self.histories[i])
            ),
            *(Buffer("weights", timeline.sites[0]) for timeline in self.timelines),
            *(
                Buffer("keys", i, part)
                for i in self.remembering
                for part in range(len(self.sites[i].projections))
            ),
            *(Buffer("score", i) for i in self.scored),
            *(Buffer("entropy", i) for i in self.entropies),
            *(Buffer("picked", i) for i in self.scored),
        )

    def inside(self, modes: Modes) -> tuple[int, ...]:
        """Indices of the sites that select within a step.

        Their score needs a cross-attention that runs before them in the step.
        """
        chosen = []
        for i in self.scored:
            source = self.entropy_sources[i]
            if modes[i] == "partial" and source is not None and source < i:
                chosen += [i] if modes[source] in _RUNS else []
        return tuple(chosen)

    def renews_score(self, site: int, modes: Modes) -> bool:
        """Whether a step in ``modes`` renews a site's base score.

        It does so with the attention, or if that is never cached, with the site itself.
        """
        attention = modes[self.sites[site].influence or 0]
        return attention == "full" or (attention == "compute" and modes[site] == "full")

    def is_read(self, at: int) -> bool:
        """Whether scores of attention from call ``at`` are used before they are renewed."""
        for site in self.scored_by_attention:
            for step in self.steps[at + 1 :]:
                if step.modes[site] == "partial":
                    return True
                if self.renews_score(site, step.modes):
                    break
        return False

    def full_step(self, at: int) -> StepPlan:
        """The full step for call ``at``, if that has to be full against the schedule."""
        index = self.steps[min(at, len(self.steps) - 1)].index
        fresh = tuple(site.tokens for site in self.sites)
        return StepPlan(index, self.full_modes, fresh, self.is_read(at), self.whole)

    def step(self, modes: Modes, hoisted: Sequence[str] = ()) -> StepSpec:
        """All that the graph of steps in ``modes`` depends on.

        The values of the nodes ``hoisted`` are inputs of the graph.
        """
        renewed = [i for i in self.scored_by_attention if self.renews_score(i, modes)]
        return StepSpec(
            sites=self.sites,
            modes=modes,
            hoisted=tuple(hoisted),
            dtypes=self.dtypes,
            histories=self.histories,
            runs=self.runs,
            keys=tuple(i for i in self.remembering if self._uses_keys(i, modes)),
            entropies=tuple(i for i in self.entropies if modes[i] in _RUNS),
            scores=tuple(self._attention_score(i) for i in renewed),
            selections=tuple(self._selection(i) for i in self.inside(modes)),
            shared=self.settings.shared,
        )

    def _uses_keys(self, site: int, modes: Modes) -> bool:
        """Whether keys and values of an attention are computed, or read for fresh queries."""
        anchor = self.sites[site].anchor
        streams = [i for i in self.remembering if self.sites[i].anchor == anchor]
        return modes[site] in _RUNS or any(modes[i] == "partial" for i in streams)

    def _attention_score(self, site: int) -> AttentionScore:
        source = self.sites[site].influence
        if source is None:
            raise AssertionError("a site without an attention is not scored by one")
        # Of the sites that an attention scores, that which wants the most queries decides.
        anchor = self.sites[source].anchor
        every = [
            self.policies[i].scores.every
            for i in self.scored_by_attention
            if self.sites[self.sites[i].influence or 0].anchor == anchor
            and self.policies[i].scores.self_attention
        ]
        weights = scores.weights(self.policies[site].scores, "full")
        return AttentionScore(site, source, weights, min(every, default=1))

    def _selection(self, site: int) -> Selection:
        source = self.entropy_sources[site]
        if source is None:
            raise AssertionError("sites select within a step by a cross-attention only")
        spatial = self.spatial[site] if self.spatial else None
        return Selection(site, source, self.entropy_weights[site], spatial)
