"""Sites x policy x number of steps -> what every site does on every step. Pure; nothing is traced
or run.

A site's *mode* on a step is one of

    full      computed for all tokens; its output is written to the cache
    partial   computed for K fresh tokens; the others come from the cache
    reuse     taken from the cache whole
    compute   computed for all tokens and never cached (the policy says so, or no later step would read the cache)
"""

from __future__ import annotations

import difflib
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from toca_fx.diagnostics import PolicyError, Problem
from toca_fx.match.sites import Matches, Site
from toca_fx.policy import Interval, Policy, Ratio, Rule, Scores, SitePolicy

Modes = tuple[str, ...]


@dataclass(frozen=True)
class StepPlan:
    """One step: ``index`` is s of the paper (counting down for ``order: descending``); one mode and
    one K per site.

    ``fresh[i]`` is the number of tokens per sample that site i computes: all for full and compute,
    0 for reuse. ``read`` says whether a later step chooses by the scores of attention that this one
    renews.
    """

    index: int
    modes: Modes
    fresh: tuple[int, ...]
    read: bool = True

    @property
    def kind(self) -> str:
        """``full`` if no site reads its cache, ``partial`` if no cached site is computed whole,
        else ``mixed``.
        """
        cached = {mode for mode in self.modes if mode != "compute"}
        if cached <= {"full"}:
            return "full"
        return "mixed" if "full" in cached else "partial"


@dataclass(frozen=True)
class Plan:
    """What ``policies[i]`` makes ``sites[i]`` do on each of ``steps``, in the order of the
    calls.
    """

    sites: tuple[Site, ...]
    policies: tuple[SitePolicy, ...]
    steps: tuple[StepPlan, ...]
    warnings: tuple[str, ...] = ()

    @cached_property
    def full_modes(self) -> Modes:
        """The modes of a full step: every site that is ever cached is written."""
        return self.steps[0].modes

    @cached_property
    def cached(self) -> tuple[int, ...]:
        """Indices of the sites that have a cache."""
        return tuple(i for i, mode in enumerate(self.full_modes) if mode == "full")

    @cached_property
    def scored(self) -> tuple[int, ...]:
        """Indices of the sites that select tokens on some step."""
        return tuple(
            i for i in self.cached if any(step.modes[i] == "partial" for step in self.steps)
        )

    @cached_property
    def scored_by_attention(self) -> tuple[int, ...]:
        """Those of ``scored`` whose score needs queries, keys or values: a full step has to compute
        it.
        """
        return tuple(
            i
            for i in self.scored
            if self.policies[i].scores.needs_attention and self.sites[i].influence is not None
        )

    @cached_property
    def entropies(self) -> tuple[int, ...]:
        """Indices of the cross-attentions whose entropy some site selects by."""
        sources = {
            self.sites[i].entropy for i in self.scored if self.policies[i].scores.cross_attention
        }
        return tuple(sorted(source for source in sources if source is not None))

    @cached_property
    def remembering(self) -> tuple[int, ...]:
        """Indices of the self- and joint attentions that keep keys and values, because queries are
        computed for fresh tokens only.
        """
        anchors = {self.sites[i].anchor for i in self.scored if self.sites[i].projections}
        return tuple(
            i for i in self.cached if self.sites[i].anchor in anchors and self.sites[i].projections
        )

    @cached_property
    def runs(self) -> tuple[tuple[int, ...], ...]:
        """Sites of a block that share the first one's cache: they follow each other, and are always
        reused together.
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
        same = self.policies[one].cache == self.policies[other].cache
        return (
            together and same and self.policies[one].cache.grain == "block" and one in self.cached
        )

    @cached_property
    def shared_by(self) -> dict[int, int]:
        """Sites without a cache of their own, and the first of their run."""
        return {i: run[0] for run in self.runs for i in run[1:]}

    def inside(self, modes: Modes) -> tuple[int, ...]:
        """Indices of the sites that select within the step: their score needs a cross-attention
        that runs before them in it.
        """
        chosen = []
        for i in self.scored:
            source = self.sites[i].entropy
            wanted = modes[i] == "partial" and self.policies[i].scores.cross_attention
            if wanted and source is not None and source < i and modes[source] != "reuse":
                chosen.append(i)
        return tuple(chosen)

    def judges(self, site: int, modes: Modes) -> bool:
        """Whether a step in ``modes`` renews a site's base score: with its attention, or with the
        site itself if that is never cached.
        """
        attention = modes[self.sites[site].influence or 0]
        return attention == "full" or (attention == "compute" and modes[site] == "full")

    def is_read(self, at: int) -> bool:
        """Whether scores of attention from the ``at``-th call are chosen by before they are
        renewed.
        """
        for site in self.scored_by_attention:
            for step in self.steps[at + 1 :]:
                if step.modes[site] == "partial":
                    return True
                if self.judges(site, step.modes):
                    break
        return False

    def full_step(self, at: int) -> StepPlan:
        """The full step, for the ``at``-th call if it has to be full although the schedule says
        otherwise.
        """
        index = self.steps[min(at, len(self.steps) - 1)].index
        return StepPlan(
            index, self.full_modes, tuple(site.tokens for site in self.sites), self.is_read(at)
        )


def make_plan(matches: Matches, policy: Policy, num_steps: int | None = None) -> Plan:
    """Lay ``policy`` over the matched sites for ``num_steps`` model calls (default: the policy's
    own step count).

    Raises:
        PolicyError: a rule matches no site; explicit step lists meet another step count than they
            were written for; the policy asks for what the inputs do not have (an even batch for
            shared selections).
    """
    total = policy.sampler.steps if num_steps is None else num_steps
    check_rules(policy, matches)
    sites = matches.sites
    policies = tuple(policy.for_site(site.kind, site.path, site.layer) for site in sites)
    _refuse_unavailable(policy, sites, policies)
    if total != policy.sampler.steps:
        _refuse_explicit_steps(policy, policies, total)
    order = range(total) if policy.sampler.order == "ascending" else range(total - 1, -1, -1)
    indices = tuple(order)
    spans = _layer_spans(sites)

    columns = []
    for site, site_policy in zip(sites, policies, strict=True):
        full = full_steps(site_policy.N, indices, total)
        fresh = tuple(
            fresh_tokens(site_policy, s, total, site.layer, spans[site.block], site.tokens)
            for s in indices
        )
        columns.append(_site_column(site, site_policy, indices, full, fresh))
    steps = tuple(
        StepPlan(
            s,
            tuple(column[0][at] for column in columns),
            tuple(column[1][at] for column in columns),
        )
        for at, s in enumerate(indices)
    )
    plan = Plan(sites, policies, steps)
    steps = tuple(replace(step, read=plan.is_read(at)) for at, step in enumerate(steps))
    return Plan(sites, policies, steps, tuple(_doubts(plan)))


def _doubts(plan: Plan) -> Iterator[str]:
    """One warning per kind of score that some sites cannot have, and one for caches that nobody
    shares.
    """
    kinds: tuple[tuple[Callable[[Scores], object], str, str, str], ...] = (
        (
            lambda scores: scores.needs_attention,
            "influence",
            "self- or joint attention",
            "self_attention, value_norm and key_norm count",
        ),
        (
            lambda scores: scores.cross_attention,
            "entropy",
            "cross-attention",
            "cross_attention counts",
        ),
    )
    for needed, source, what, names in kinds:
        paths = [
            plan.sites[i].path
            for i in plan.scored
            if needed(plan.policies[i].scores) and getattr(plan.sites[i], source) is None
        ]
        if paths:
            more = f" (and {len(paths) - 1} more sites)" if len(paths) > 1 else ""
            yield f"no {what} of the same block and tokens judges `{paths[0]}`{more}: the score {names} as 0 there"
    if (
        plan.cached
        and not plan.runs
        and all(plan.policies[i].cache.grain == "block" for i in plan.cached)
    ):
        yield "cache.grain is block, but no two modules that follow each other in a block are always reused together: each has its own"


def _site_column(
    site: Site,
    policy: SitePolicy,
    indices: Sequence[int],
    full: frozenset[int],
    fresh: tuple[int, ...],
) -> tuple[Modes, tuple[int, ...]]:
    """Modes and token counts of one site over all steps."""
    mode = policy.action.mode
    if mode == "compute" or all(s in full for s in indices):
        return ("compute",) * len(indices), (site.tokens,) * len(indices)
    wanted = [count for s, count in zip(indices, fresh, strict=True) if s not in full]
    if mode == "reuse" or not any(wanted):
        partial, fresh = "reuse", (0,) * len(indices)
    else:
        partial = "partial"
    # An attention of no queries is none: the kernels fail on it. An MLP of no tokens runs through
    # the graph of any other number.
    none = "reuse" if site.kind != "mlp" else partial
    modes = tuple(
        "full" if s in full else partial if count else none
        for s, count in zip(indices, fresh, strict=True)
    )
    return modes, tuple(
        site.tokens if s in full else count for s, count in zip(indices, fresh, strict=True)
    )


def full_steps(interval: Interval, indices: Sequence[int], total: int) -> frozenset[int]:
    """The step indices s, among ``indices`` in the order of the calls, on which everything is
    computed.

    The interval is re-evaluated at full steps: N(s) = round_half_even(base / (1 + w - 2 w s / T)),
    w = ``drift`` (ToCa, section 3.3, and the authors' force scheduler). ``phase: modulo`` is the
    authors' rule: a step is full when s is a multiple of the interval in force and of the one
    re-evaluated at s; either way the latter is in force from then on.
    """
    forced = {
        *indices[: interval.first],
        *indices[len(indices) - interval.last :],
        *interval.extra_full_steps,
    }
    if interval.full_steps is not None:
        return frozenset({*interval.full_steps, *forced})
    full: set[int] = set()
    current, since = 1, 0
    for s in indices:
        since += 1
        if interval.phase == "modulo":
            due = s % current == 0
            if due or s in indices[: interval.first]:
                current = _interval_at(interval, s, total)
            due = due and s % current == 0
            if due or s in forced:
                full.add(s)
        elif since >= current or s in forced:
            full.add(s)
            current, since = _interval_at(interval, s, total), 0
    return frozenset(full)


def _interval_at(interval: Interval, s: int, total: int) -> int:
    for window in interval.windows:
        if window.start * total <= s < window.stop * total:
            return window.interval
    # Python's round is half to even, as the authors' numpy one is.
    return max(1, round(interval.base / (1 + interval.drift - 2 * interval.drift * s / total)))


def fresh_tokens(policy: SitePolicy, s: int, total: int, layer: int, span: int, tokens: int) -> int:
    """K = trunc(rho * tokens), rho = clamp((1 - R) * step factor * layer factor * module weight, 0,
    1) in float32.

    ``span`` is the highest layer index, used unless the policy says ``layer_span``. The factors
    fall linearly from 1 + w to 1 - w over the steps and over the layers (ToCa, section 3.3). Then K
    is rounded up to the policy's ``multiple``.
    """
    ratio: Ratio = policy.R
    step_factor = 1 + ratio.step_weight - 2 * ratio.step_weight * s / total
    layer_factor = (
        1 + ratio.layer_weight - 2 * ratio.layer_weight * layer / (ratio.layer_span or max(span, 1))
    )
    # 1 - 0.93 is not 0.07 in binary; the rounding undoes the subtraction's last bits.
    share = round(1 - ratio.base, 12) * layer_factor * step_factor * policy.action.weight
    count = math.trunc(_float32(_float32(min(max(share, 0.0), 1.0)) * tokens))
    return min(tokens, -(-count // ratio.multiple) * ratio.multiple)


def _float32(value: float) -> float:
    """``value`` rounded to single precision."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _layer_spans(sites: Sequence[Site]) -> dict[str, int]:
    spans: dict[str, int] = {}
    for site in sites:
        spans[site.block] = max(spans.get(site.block, 0), site.layer)
    return spans


def check_rules(policy: Policy, matches: Matches) -> None:
    """Raise PolicyError naming every rule that matches no site, with what came nearest."""
    problems = [
        Problem.at(
            rule.position,
            f"the rule matches none of the {len(matches.sites)} sites; {_nearest_miss(rule, matches)}",
        )
        for rule in policy.rules
        if not any(rule.applies(site.kind, site.path, site.layer) for site in matches.sites)
    ]
    if problems:
        raise PolicyError(problems)


def _nearest_miss(rule: Rule, matches: Matches) -> str:
    """Relax one selector at a time and say which one was in the way."""
    sites = matches.sites
    if not sites:
        reasons = "; ".join(f"{miss.path}: {miss.reason}" for miss in matches.misses[:3])
        return "the model has none" + (f" ({reasons})" if reasons else "")
    typed = [site for site in sites if rule.match in (None, site.kind)]
    if not typed:
        return f"the model has no {rule.match}, only {', '.join(sorted({site.kind for site in sites}))}"
    if rule.path is not None:
        paths = [site.path for site in typed]
        if not any(Rule.path_matches(rule.path, path) for path in paths):
            close = difflib.get_close_matches(rule.path, paths, n=1, cutoff=0.0)
            return f"no path matches `{rule.path}`; the nearest is `{close[0]}`"
    layers = sorted(site.layer for site in typed)
    return f"those that match otherwise have layers {layers[0]} to {layers[-1]}"


def _refuse_unavailable(
    policy: Policy, sites: Sequence[Site], policies: Sequence[SitePolicy]
) -> None:
    problems = []
    selecting = [
        (site, own)
        for site, own in zip(sites, policies, strict=True)
        if own.action.mode == "partial"
    ]
    odd = [
        site for site, _ in selecting if policy.guidance.selection == "shared" and site.shape[0] % 2
    ]
    if odd:
        message = f"guidance.selection is shared, which needs both halves in one batch; `{odd[0].path}` has a batch of {odd[0].shape[0]}"
        problems.append(Problem.at(policy.source, message))
    if problems:
        raise PolicyError(problems)


def _refuse_explicit_steps(policy: Policy, policies: Sequence[SitePolicy], total: int) -> None:
    if any(site.N.full_steps is not None or site.N.extra_full_steps for site in policies):
        message = (
            f"policy `{policy.name}` lists full steps by index, which hold for its {policy.sampler.steps} steps only; "
            f"this session has {total}. Use base, drift and windows instead, or run {policy.sampler.steps} steps"
        )
        raise PolicyError([Problem.at(policy.source, message)])
