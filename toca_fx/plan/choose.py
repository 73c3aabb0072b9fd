"""The choice of a policy for a model that none was given for."""

from __future__ import annotations

import logging
import os

from toca_fx.policy import Policy, load_policy, shipped_policies

log = logging.getLogger(__name__)


def default_policy(model_class: str, latents_rank: int | None) -> Policy:
    """The policy for a model that none was given for; logs which.

    It is TOCA_POLICY if set, else the shipped policy that names ``model_class``, else
    ``default-video`` if the latents have five axes, else ``default-image``.
    """
    if chosen := os.environ.get("TOCA_POLICY"):
        log.info("policy `%s` (from TOCA_POLICY)", chosen)
        return load_policy(chosen)
    for name in sorted(shipped_policies()):
        policy = load_policy(name)
        if not name.startswith("reference/") and model_class in policy.model:
            log.info("policy `%s` (it names %s)", name, model_class)
            return policy
    name = "default-video" if latents_rank == 5 else "default-image"
    log.info("policy `%s` (none names %s)", name, model_class or "the model")
    return load_policy(name)


def written_for_another(policy: Policy, model_class: str) -> str | None:
    """The warning that a policy is for other models than this one, if it is."""
    if not policy.model or not model_class or model_class in policy.model:
        return None
    written_for = ", ".join(policy.model)
    return f"policy `{policy.name}` was written for {written_for}; the model is a {model_class}"
