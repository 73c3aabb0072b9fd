"""Checks that the model and the number of steps have what a policy asks for."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from toca_fx.diagnostics import PolicyError, Problem
from toca_fx.match.sites import Matches, Site
from toca_fx.policy import Policy, Rule, SitePolicy


def check_rules(policy: Policy, matches: Matches) -> None:
    """Check that every rule matches a site.

    Raises:
        PolicyError: some do not; it names all of them, with what came nearest.
    """
    number = len(matches.sites)
    problems = [
        Problem.at(
            rule.position,
            f"the rule matches none of the {number} sites; {_nearest_miss(rule, matches)}",
        )
        for rule in policy.rules
        if not any(rule.applies(site.kind, site.path, site.layer) for site in matches.sites)
    ]
    if problems:
        raise PolicyError(problems)


def _nearest_miss(rule: Rule, matches: Matches) -> str:
    """Say which selector of a rule excludes all sites, by relaxing one at a time."""
    sites = matches.sites
    if not sites:
        reasons = "; ".join(f"{miss.path}: {miss.reason}" for miss in matches.misses[:3])
        return "the model has none" + (f" ({reasons})" if reasons else "")
    typed = [site for site in sites if rule.match in (None, site.kind)]
    if not typed:
        kinds = ", ".join(sorted({site.kind for site in sites}))
        return f"the model has no {rule.match}, only {kinds}"
    if rule.path is not None:
        paths = [site.path for site in typed]
        if not any(Rule.path_matches(rule.path, path) for path in paths):
            close = difflib.get_close_matches(rule.path, paths, n=1, cutoff=0.0)
            return f"no path matches `{rule.path}`; the nearest is `{close[0]}`"
    layers = sorted(site.layer for site in typed)
    return f"those that match otherwise have layers {layers[0]} to {layers[-1]}"


def without_halves(sites: Sequence[Site], policies: Sequence[SitePolicy]) -> Site | None:
    """A site that selects tokens, and whose batch has no two halves to share a selection."""
    for site, own in zip(sites, policies, strict=True):
        if own.action.mode == "partial" and site.shape[0] % 2:
            return site
    return None


def check_explicit_steps(policy: Policy, policies: Sequence[SitePolicy], total: int) -> None:
    """Check that ``total`` is the policy's number of steps, if steps are listed by index.

    Raises:
        PolicyError: it is another.
    """
    planned = policy.sampler.steps
    if total == planned:
        return
    if any(own.N.by_index for own in policies):
        what, instead = "full steps", f"base, drift and windows, or {{of: {planned}, at: [...]}},"
    elif isinstance(policy.skip, tuple):
        what, instead = "skipped steps", "`all` or `alternate`"
    else:
        return
    message = (
        f"policy `{policy.name}` lists {what} by index, which hold for its {planned} steps "
        f"only; this session has {total}. Use {instead} instead, or run {planned} steps"
    )
    raise PolicyError([Problem.at(policy.source, message)])
