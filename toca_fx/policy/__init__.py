"""Policies: how they are found, loaded and checked. The dataclasses, which declare every key of
the format, are re-exported here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from toca_fx.diagnostics import PolicyError, Problem, did_you_mean
from toca_fx.policy.check import check
from toca_fx.policy.document import Document, from_mapping
from toca_fx.policy.forecast import Forecast
from toca_fx.policy.gate import Gate
from toca_fx.policy.interval import Interval, Placement, Window
from toca_fx.policy.modules import MODULE_TYPES, Action
from toca_fx.policy.parse import parse_text, read_text
from toca_fx.policy.selection import Ratio, Scores, Spatial, scores_of
from toca_fx.policy.settings import WHOLE_GRAINS, Cache, Guidance, Hoisting, Recording, Sampler
from toca_fx.policy.types import Policy, Rule, SitePolicy, Skip

__all__ = [
    "MODULE_TYPES",
    "WHOLE_GRAINS",
    "Action",
    "Cache",
    "Forecast",
    "Gate",
    "Guidance",
    "Hoisting",
    "Interval",
    "Placement",
    "Policy",
    "PolicySource",
    "Ratio",
    "Recording",
    "Rule",
    "Sampler",
    "Scores",
    "SitePolicy",
    "Skip",
    "Spatial",
    "Window",
    "load_policy",
    "scores_of",
    "shipped_policies",
    "validate_file",
]

PolicySource: TypeAlias = str | os.PathLike[str] | Mapping[str, object] | Policy

_log = logging.getLogger(__name__)


def load_policy(source: PolicySource) -> Policy:
    """Load a policy: a shipped name, the path of a file, a mapping in the form of the YAML, or a
    Policy as it is.

    A shipped name comes before a file of the same name in the current directory (write `./name` for
    that one). Raises PolicyError with every problem, positioned, and TypeError for anything else.
    Warnings are logged.
    """
    if isinstance(source, Policy):
        return source
    if isinstance(source, Mapping):
        policy, problems = check(from_mapping(source), Policy)
    elif not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"policy={source!r}: expected a shipped name, a path, a mapping or a Policy"
        )
    else:
        policy, problems = _check_file(_locate(source))
    for problem in problems:
        if problem.severity == "warning":
            _log.warning("%s", problem)
    if any(problem.severity == "error" for problem in problems):
        raise PolicyError(problems)
    return policy


def validate_file(file: str | os.PathLike[str]) -> tuple[Problem, ...]:
    """Every problem of a policy file, in file order. Raises UnreadablePolicyError when there is no
    text to look at.
    """
    return tuple(_check_file(file)[1])


def shipped_policies() -> dict[str, Path]:
    """The policies that come with toca_fx, by name (`dit-xl-2`, `reference/dit-xl-2-ddim50`)."""
    here = Path(__file__).resolve().parents[1]
    # In a wheel they lie inside the package; in a clone, beside it.
    folder = next(
        (folder for folder in (here / "policies", here.parent / "policies") if folder.is_dir()),
        here,
    )
    files = sorted(folder.rglob("*.yaml")) if folder != here else []
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _check_file(file: str | os.PathLike[str]) -> tuple[Policy, list[Problem]]:
    document = parse_text(read_text(file), os.fspath(file))
    if document.complete:
        return check(document, Policy)
    # Half a file says little about the rest: only what was found in it is reported.
    policy, _ = check(Document(document.file, {}), Policy)
    return policy, document.problems


def _locate(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
    if not isinstance(source, str):
        return source
    shipped = shipped_policies()
    if source in shipped:
        return shipped[source]
    looks_like_a_file = source.endswith((".yaml", ".yml")) or source.startswith((".", "/", "~"))
    if looks_like_a_file or os.path.isfile(source):
        return os.path.expanduser(source)
    message = f"there is no shipped policy and no file of this name{did_you_mean(source, shipped)}"
    raise PolicyError([Problem(source, 0, 0, f"{message} (shipped: {', '.join(shipped)})")])
