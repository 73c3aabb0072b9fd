"""What a policy gives a memory: modules, and the model where steps are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from toca_fx.match.sites import Matches, Site
from toca_fx.policy import WHOLE_GRAINS, Action, Policy, SitePolicy

REUSE = Action("reuse")
WHOLE = ("state", "output")
"""The kinds of sites that are the whole model: in front of its output layers, and behind them."""


def units(
    policy: Policy, matches: Matches, total: int
) -> tuple[tuple[Site, ...], tuple[SitePolicy, ...], str]:
    """The sites of a plan, whole models last, with the policy of each; and a warning, or "".

    With the grain of the model, or of its output, a module has no memory.
    """
    policies = tuple(_policy_of(site, policy) for site in matches.sites)
    whole = whole_model(policy, matches)
    warning = _uncut(matches) if _keeps_states(policy) and not matches.states else ""
    if policy.cache.grain in WHOLE_GRAINS:
        policies = tuple(replace(own, action=Action("compute")) for own in policies)
    own = SitePolicy(
        policy.N,
        policy.R,
        REUSE,
        policy.scores,
        None,
        policy.cache,
        policy.forecast,
    )
    policies = (*policies, *[own] * len(whole))
    return (*matches.sites, *whole), tuple(_resolved(each, total) for each in policies), warning


def _policy_of(site: Site, policy: Policy) -> SitePolicy:
    """The policy of a site; one whose tokens cannot be chosen is reused where they would be."""
    own = policy.for_site(site.kind, site.path, site.layer)
    return replace(own, action=REUSE) if site.whole and own.action.mode == "partial" else own


def whole_model(policy: Policy, matches: Matches) -> tuple[Site, ...]:
    """What is kept of the whole model, as sites: its states, or where the output layers cannot be
    cut off its outputs. It is () where every step runs the blocks.
    """
    if _keeps_states(policy):
        return matches.states or matches.outputs
    return matches.outputs if policy.cache.grain == "output" else ()


def _keeps_states(policy: Policy) -> bool:
    grain = policy.cache.grain
    return grain == "model" or (grain != "output" and policy.skip != "none")


def count_whole(sites: Sequence[Site]) -> int:
    """How many of the sites of a plan, the last ones, are the whole model."""
    return sum(site.kind in WHOLE for site in sites)


def _resolved(own: SitePolicy, total: int) -> SitePolicy:
    """The policy of a site with what its forecast leaves to the number of first full steps.

    TaylorSeer's authors difference against the last but one of them, and none before.
    """
    forecast = own.forecast
    if forecast.ignore is not None or forecast.basis not in ("taylor", "hermite"):
        return own
    ignored = max(0, own.N.ends(total)[0] - 2)
    return replace(own, forecast=replace(forecast, ignore=ignored))


def _uncut(matches: Matches) -> str:
    """The warning that the model has no state to be kept."""
    instead = "what steps without any block take from earlier ones is the output of the model"
    if not matches.outputs:
        instead = "no step can do without its blocks"
    return f"the output layers cannot be cut off ({matches.uncut}): {instead}"
