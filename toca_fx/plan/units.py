"""What a policy gives a memory: modules, and the model where steps are skipped."""

from __future__ import annotations

from dataclasses import replace

from toca_fx.match.sites import Matches, Site
from toca_fx.policy import Action, Policy, SitePolicy

WHOLE = ("state", "output")
"""The kinds of sites that are the whole model: in front of its output layers, and behind them."""


def units(policy: Policy, matches: Matches) -> tuple[tuple[Site, ...], tuple[SitePolicy, ...], str]:
    """The sites of a plan, whole models last, with the policy of each; and a warning, or "".

    With the grain of the model, or of its output, a module has no memory. Where the output layers
    cannot be cut off the memory is that of the output.
    """
    policies = tuple(policy.for_site(site.kind, site.path, site.layer) for site in matches.sites)
    grain, warning = policy.cache.grain, ""
    whole = matches.outputs if grain == "output" else ()
    if grain == "model" or policy.skip != "none":
        whole = matches.states or matches.outputs
        if not matches.states:
            warning = _uncut(matches.uncut)
    if grain in ("model", "output"):
        policies = tuple(replace(own, action=Action("compute")) for own in policies)
    own = SitePolicy(
        policy.N,
        policy.R,
        Action("reuse"),
        policy.scores,
        None,
        policy.cache,
        policy.forecast,
    )
    return (*matches.sites, *whole), (*policies, *[own] * len(whole)), warning


def _uncut(reason: str) -> str:
    """The warning that the model has no state to be kept."""
    return (
        f"the output layers cannot be cut off ({reason}): what steps without any block take from "
        "earlier ones is the output of the model"
    )
