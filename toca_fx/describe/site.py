"""What is said of one site: what a policy does with it, and what it remembers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from toca_fx.plan.units import WHOLE


@dataclass(frozen=True)
class Kept:
    """What a unit remembers: a ``history`` of so many values of a ``shape`` and ``dtype``.

    ``grain`` is "module", "block", "model" (its state in front of the output layers) or "output".
    A block has one memory, ``nbytes`` of it with its first module. ``forecast`` says in words what
    is made of it. The weights of a planned step sum up, by their absolute values, to ``noise`` at
    most, on the step with index ``noisiest``: as many times as large errors of what is kept, such
    as its rounding, can become.
    """

    grain: str
    history: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    forecast: str
    noise: float = 1.0
    noisiest: int | None = None

    def __str__(self) -> str:
        values = "1 value" if self.history == 1 else f"{self.history} values"
        size = f"{list(self.shape)} {self.dtype}"
        text = f"keeps {values} {size} of the {self.grain}; {self.forecast}"
        if self.noisiest is not None:
            text += f", errors at most {self.noise:.3g} times as large (s = {self.noisiest})"
        return text

    def to_dict(self) -> dict[str, Any]:
        """The memory as JSON-ready data."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class SiteExplanation:
    """A site and what the policy does with it.

    ``modes`` and ``computed`` hold one entry per step: the mode (see ``plan``) and the tokens per
    sample. ``action`` is what the policy asks for, ``says`` the entry or rule that asks for it.
    ``influence`` and ``entropy`` are the paths of the attentions that give s1 and s2 of its tokens,
    ``scores`` the weights other than 0. ``gathers`` say which operators run on all tokens in
    partial steps, because an operator behind them cannot be restricted to fresh ones. The whole
    model is a site of kind "state" or "output", with an empty ``path``.
    """

    path: str
    kind: str
    layer: int
    tokens: int
    action: str
    says: str
    modes: tuple[str, ...]
    computed: tuple[int, ...]
    influence: str | None
    entropy: str | None
    scores: tuple[tuple[str, float], ...]
    gathers: tuple[str, ...] = ()
    kept: Kept | None = None

    def __str__(self) -> str:
        return describe([self])

    @property
    def is_left_out(self) -> bool:
        """Whether a memory of the whole model stands in for it."""
        return self.says == "cache.grain" and self.kind not in WHOLE

    def to_dict(self) -> dict[str, Any]:
        """The site as JSON-ready data."""
        return {
            "path": self.path,
            "kind": self.kind,
            "layer": self.layer,
            "tokens": self.tokens,
            "does": str(self),
            "action": self.action,
            "says": self.says,
            "modes": list(self.modes),
            "computed": list(self.computed),
            "influence": self.influence,
            "entropy": self.entropy,
            "scores": dict(self.scores),
            "gathers": list(self.gathers),
            "kept": None if self.kept is None else self.kept.to_dict(),
        }


def describe(sites: Sequence[SiteExplanation]) -> str:
    """What is done over the run with sites whose modes are the same."""
    site = sites[0]
    counts, total = Counter(site.modes), len(site.modes)
    if counts["compute"]:
        return _computed(site, counts, total)
    parts = [f"full on {counts['full']}"] if counts["full"] else []
    if counts["partial"]:
        numbers = [
            count
            for each in sites
            for count, mode in zip(each.computed, each.modes, strict=True)
            if mode == "partial"
        ]
        span = span_of(min(numbers), max(numbers), " to ")
        parts.append(f"{span} of {site.tokens} tokens on {counts['partial']}")
    if counts["reuse"]:
        has_history = site.kept is not None and site.kept.history > 1
        parts.append(f"{'forecast' if has_history else 'reused'} on {counts['reuse']}")
    if counts["skip"]:
        parts.append(f"skipped on {counts['skip']}")
    is_asked_elsewhere = site.says not in (f"modules.{site.kind}", "cache.grain", "skip")
    rule = f" ({site.says})" if is_asked_elsewhere else ""
    is_none = site.action == "partial" and not counts["partial"]
    small = ": its share is less than one token" if is_none else ""
    return f"{', '.join(parts)} of {total} steps{small}{rule}"


def _computed(site: SiteExplanation, counts: Counter[str], total: int) -> str:
    """What is said of a site without a memory."""
    if site.is_left_out:
        reason = "cache.grain keeps the whole model"
    elif site.action == "compute":
        reason = f"{site.says} says compute"
    else:
        reason = "no other step reads it" if counts["skip"] else "every step is full"
    on = "every step"
    if counts["skip"]:
        on = f"{counts['compute']}, skipped on {counts['skip']} of {total} steps"
    return f"computed on {on}: {reason}"


def span_of(first: int, last: int, dash: str = "-") -> str:
    """A range of numbers as text."""
    return str(first) if first == last else f"{first}{dash}{last}"
