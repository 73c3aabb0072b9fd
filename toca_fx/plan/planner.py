"""Sites x policy x number of steps -> plan. Pure, and without torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property

from toca_fx.match.sites import Matches, Site
from toca_fx.plan import scores
from toca_fx.plan.check import check_explicit_steps, check_rules, without_halves
from toca_fx.plan.grids import spatial_bonus
from toca_fx.plan.plan import Plan, Settings, StepPlan
from toca_fx.plan.schedule import (
    Modes,
    fresh_tokens,
    full_steps,
    layer_spans,
    site_column,
    skipped_steps,
    state_column,
)
from toca_fx.plan.units import WHOLE, count_whole, units
from toca_fx.policy import WHOLE_GRAINS, Gate, Policy, SitePolicy

_MOST_PLANS = 32


class Planner:
    """The plans of one model under one policy, by the number of steps.

    ``aspect`` is the height and width of the latent image, if it is one.
    """

    def __init__(
        self, policy: Policy, matches: Matches, aspect: tuple[int, int] | None = None
    ) -> None:
        self.settings = resolve(policy)
        self.matches = matches
        self._policy, self._aspect = policy, aspect
        self._plans: OrderedDict[int, Plan] = OrderedDict()  # the one used last is last

    def plan(self, num_steps: int | None = None) -> Plan:
        """The plan for a generation of ``num_steps`` model calls; None: the policy's number.

        Raises:
            PolicyError: see ``make_plan``.
        """
        total = self.settings.steps if num_steps is None else num_steps
        found = self._plans.get(total)
        if found is None:  # two threads may make it, and have the same one
            made = make_plan(self.matches, self._policy, total, self._aspect)
            found = self._plans.setdefault(total, made)
        with suppress(KeyError):  # another thread has been here
            self._plans.move_to_end(total)
            while len(self._plans) > _MOST_PLANS:
                self._plans.popitem(last=False)
        return found

    @cached_property
    def uncached(self) -> Plan:
        """The plan that runs the model as it is."""
        return Plan((), (), (StepPlan(0, (), ()),), self.settings)


def resolve(policy: Policy) -> Settings:
    """The settings of a policy that hold for whole generations."""
    return Settings(
        policy=policy.name,
        steps=policy.sampler.steps,
        seed=policy.seed,
        shared=policy.guidance.selection == "shared",
        scales=_scales(policy),
        noise=policy.sampler.noise,
        separate=policy.guidance.layout == "separate",
        hoisting_bytes=policy.hoisting.memory_bytes,
        recording_bytes=policy.recording.memory_bytes,
        gate=_bounded(policy),
    )


def _scales(policy: Policy) -> bool:
    """Whether it says the same of any number of steps: no slopes, windows or numbers of steps."""
    if policy.gate is not None and policy.cache.grain in WHOLE_GRAINS:
        return True
    return policy.N.full_steps is not None and not policy.N.by_index


def _bounded(policy: Policy) -> Gate | None:
    """The gate with what ``N`` says of it."""
    gate, interval = policy.gate, policy.N
    if gate is None or gate.at_most is not None or interval.full_steps is not None:
        return gate
    return replace(gate, at_most=interval.base - 1)


def make_plan(
    matches: Matches,
    policy: Policy,
    num_steps: int | None = None,
    aspect: tuple[int, int] | None = None,
) -> Plan:
    """Lay ``policy`` over the matched sites for ``num_steps`` model calls; None: its own number.

    Raises:
        PolicyError: a rule matches no site; explicit step lists meet another step count than they
            were written for; the policy asks for a spatial bonus, and the tokens form no grid.
            Nothing else of a policy depends on the inputs, and later rooms refuse none.
    """
    total = policy.sampler.steps if num_steps is None else num_steps
    check_rules(policy, matches)
    ascending = policy.sampler.order == "ascending"
    indices = tuple(range(total) if ascending else range(total - 1, -1, -1))
    sites, policies, uncut = units(policy, matches, total)
    check_explicit_steps(policy, policies, total)
    skipped, whole = frozenset[int](), count_whole(sites)
    gated = policy.gate is not None
    if whole:
        skipped = skipped_steps(policy.N, policy.skip, policy.cache.grain, indices, total, gated)
    columns = _columns(sites, policies, indices, skipped, gated)
    steps = tuple(
        StepPlan(
            s,
            tuple(modes[at] for modes, _ in columns),
            tuple(k[at] for _, k in columns),
            whole=whole,
        )
        for at, s in enumerate(indices)
    )
    settings = resolve(policy)
    odd = without_halves(sites, policies) if settings.shared else None
    plan = Plan(sites, policies, steps, replace(settings, shared=settings.shared and odd is None))
    spatial = tuple(
        spatial_bonus(site, own.spatial, aspect, policy.source) if i in plan.scored else None
        for i, (site, own) in enumerate(zip(sites, policies, strict=True))
    )
    read = tuple(replace(step, read=plan.is_read(at)) for at, step in enumerate(steps))
    warnings = (*_warnings(plan), *([] if odd is None else [_each_by_itself(odd)]))
    warnings = (*warnings, *filter(None, [uncut]))
    return replace(plan, steps=read, spatial=spatial, warnings=warnings)


def _columns(
    sites: Sequence[Site],
    policies: Sequence[SitePolicy],
    indices: Sequence[int],
    skipped: frozenset[int],
    gated: bool,
) -> list[tuple[Modes, tuple[int, ...]]]:
    """The modes of each site and its numbers of computed tokens, over all steps."""
    spans, total, columns = layer_spans(sites), len(indices), []
    for site, own in zip(sites, policies, strict=True):
        if site.kind in WHOLE:
            columns.append(state_column(site, indices, skipped))
            continue
        full, span = full_steps(own.N, indices, total, gated), spans[site.block]
        fresh = tuple(fresh_tokens(own, s, total, site.layer, span, site.tokens) for s in indices)
        columns.append(site_column(site, own, indices, full, fresh, skipped))
    return columns


def _each_by_itself(odd: Site) -> str:
    """The warning that samples share no selection, though the policy says so."""
    return (
        f"guidance.selection is shared, but `{odd.path}` has a batch of {odd.shape[0]}, which has "
        "no two halves: the model is called without guidance, and each sample selects its own "
        "tokens"
    )


def _warnings(plan: Plan) -> Iterator[str]:
    """The warnings of a plan: scores that some sites cannot have, caches that no sites share."""
    kinds: tuple[tuple[scores.Source, str], ...] = (
        ("influence", "self- or joint attention"),
        ("entropy", "cross-attention"),
    )
    for source, what in kinds:
        names = [name for name, score in scores.SCORES.items() if score.source == source]
        paths = [
            plan.sites[i].path
            for i in plan.scored
            if scores.from_source(plan.policies[i].scores, source)
            and getattr(plan.sites[i], source) is None
        ]
        if paths:
            more = f" (and {len(paths) - 1} more sites)" if len(paths) > 1 else ""
            *others, last = names
            listed = f"{', '.join(others)} and {last} count" if others else f"{last} counts"
            yield (
                f"no {what} of the same block and tokens judges `{paths[0]}`{more}: "
                f"the score {listed} as 0 there"
            )
    grains = [plan.policies[i].cache.grain for i in plan.cached]
    if grains and not plan.runs and all(grain == "block" for grain in grains):
        yield (
            "cache.grain is block, but no two modules that follow each other in a block are always "
            "reused together: each has its own"
        )
