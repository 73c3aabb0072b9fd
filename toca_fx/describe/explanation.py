"""The result of ``toca_fx.explain``: data, and a page of text.

Equal rows of the blocks of one list are joined into one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from toca_fx.plan.scores import SCORES

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of the outermost block list in a module path


@dataclass(frozen=True)
class SiteExplanation:
    """A site and what the policy does with it.

    ``modes`` and ``computed`` hold one entry per step: the mode (see ``plan``) and the tokens per
    sample. ``action`` is what the policy asks for, ``says`` the entry or rule that asks for it.
    ``influence`` and ``entropy`` are the paths of the attentions that give s1 and s2 of its tokens,
    ``scores`` the weights other than 0. ``gathers`` say which operators run on all tokens in
    partial steps, because an operator behind them cannot be restricted to fresh ones.
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

    def __str__(self) -> str:
        return describe([self])

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
        }


@dataclass(frozen=True)
class Skipped:
    """Something that looks like a site and is none, why, and what could be done ("" if nothing)."""

    kind: str
    path: str
    reason: str
    advice: str

    def to_dict(self) -> dict[str, str]:
        """The near miss as JSON-ready data."""
        return {"kind": self.kind, "path": self.path, "reason": self.reason, "advice": self.advice}


@dataclass(frozen=True)
class Explanation:
    """What ``toca_fx.explain`` returns; ``str()`` gives a page to read, ``to_dict()`` everything.

    ``steps`` are (s, kind) in the order of the calls; the FLOPs are those of all steps. Where a
    gate decides, both are of as few full steps as it may leave, and ``full_range`` is how many may
    be full, from least to most.
    ``cache_bytes`` is what one guidance branch keeps, ``hoisted_bytes`` what it computes ahead of
    the steps, of one timestep. ``peak_bytes`` is all that a generation of one branch adds to the
    weights at its peak on a GPU, rounded as its allocator does. ``step_bytes`` of it is what the
    worst step takes while it runs; ``listed_bytes`` comes on top in a session that knows its
    timesteps. On a GPU steps are recorded, and then keep ``recordable_bytes`` between generations,
    unless ``queued_because`` says why not. ``passes`` are lines on what each pass did, by kind of
    step.
    """

    model: str
    policy: str
    steps: tuple[tuple[int, str], ...]
    full_range: tuple[int, int]
    sites: tuple[SiteExplanation, ...]
    skipped: tuple[Skipped, ...]
    flops_done: int
    flops_uncached: int
    cache_bytes: int
    hoisted_bytes: int
    step_bytes: int
    peak_bytes: int
    listed_bytes: int
    recordable_bytes: int
    queued_because: str
    warnings: tuple[str, ...]
    passes: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def flops_ratio(self) -> float:
        """Uncached FLOPs over done FLOPs: the factor by which work falls."""
        return self.flops_uncached / self.flops_done if self.flops_done else 1.0

    @property
    def suggestions(self) -> tuple[str, ...]:
        """Rules for a policy that would include what it now computes on every step."""
        return tuple(_suggestions(self.sites))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data, every site by itself."""
        return {
            "model": self.model,
            "policy": self.policy,
            "steps": [{"index": index, "kind": kind} for index, kind in self.steps],
            "full_steps": list(self.full_range),
            "sites": [site.to_dict() for site in self.sites],
            "skipped": [miss.to_dict() for miss in self.skipped],
            "suggestions": list(self.suggestions),
            "flops": {
                "done": self.flops_done,
                "uncached": self.flops_uncached,
                "ratio": self.flops_ratio,
            },
            "cache_bytes": self.cache_bytes,
            "hoisted_bytes": self.hoisted_bytes,
            "step_bytes": self.step_bytes,
            "peak_bytes": self.peak_bytes,
            "listed_bytes": self.listed_bytes,
            "recordable_bytes": self.recordable_bytes,
            "queued_because": self.queued_because,
            "passes": {kind: list(reports) for kind, reports in self.passes},
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        counts = Counter(kind for _, kind in self.steps)
        names = ("full", "mixed", "partial", "skip")
        kinds = [f"{counts[kind]} {kind}" for kind in names if counts[kind]]
        lines = [
            f"model      {self.model or '(no module)'}",
            f"policy     {self.policy}",
            f"steps      {len(self.steps)}: {', '.join(kinds)}",
            *self._gate(),
            f"FLOPs      {self.flops_done:.3e} of {self.flops_uncached:.3e} uncached "
            f"({self.flops_ratio:.2f}x fewer)",
            f"caches     {_mib(self.cache_bytes)} MiB, and {_mib(self.hoisted_bytes)} MiB of "
            "hoisted values",
            f"memory     {self._memory()}",
            f"on a GPU   {self._launch()}",
            "",
            *_site_lines(self.sites),
        ]
        if self.skipped:
            lines += ["", "not matched, and so computed on every step:"]
            lines += _skipped_lines(self.skipped)
        if self.suggestions:
            lines += ["", "rules that would include what the policy computes:"]
            lines += [f"  {rule}" for rule in self.suggestions]
        for kind, reports in self.passes:
            lines += ["", f"passes that make the graph of a {kind} step:"]
            lines += [f"  {report}" for report in reports]
        if self.warnings:
            lines += ["", *(f"warning: {warning}" for warning in self.warnings)]
        return "\n".join(lines)

    def _gate(self) -> Iterator[str]:
        least, most = self.full_range
        if least < most:
            yield f"gate       {least} to {most} full steps; what follows is of {least}"

    def _memory(self) -> str:
        rounding = self.peak_bytes - self.cache_bytes - self.hoisted_bytes - self.step_bytes
        text = (
            f"{_mib(self.peak_bytes)} MiB at the peak, of which {_mib(self.step_bytes)} are a "
            f"step's own and {_mib(rounding)} lost by rounding"
        )
        if self.listed_bytes:
            text += f"; {_mib(self.listed_bytes)} more if the session is told its timesteps"
        return text

    def _launch(self) -> str:
        if self.queued_because:
            return f"queued kernel by kernel: {self.queued_because}"
        kept = _mib(self.recordable_bytes)
        return f"recorded: one launch a step; keeps {kept} MiB between generations"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f}"


def describe(sites: Sequence[SiteExplanation]) -> str:
    """What is done over the run with sites whose modes are the same."""
    site = sites[0]
    counts, total = Counter(site.modes), len(site.modes)
    if counts["compute"]:
        is_asked = site.action == "compute"
        reason = f"{site.says} says compute" if is_asked else "every step is full"
        return f"computed on every step: {reason}"
    parts = [f"full on {counts['full']}"] if counts["full"] else []
    if counts["partial"]:
        numbers = [
            count
            for each in sites
            for count, mode in zip(each.computed, each.modes, strict=True)
            if mode == "partial"
        ]
        span = _span(min(numbers), max(numbers), " to ")
        parts.append(f"{span} of {site.tokens} tokens on {counts['partial']}")
    if counts["reuse"]:
        parts.append(f"reused on {counts['reuse']}")
    rule = f" ({site.says})" if site.says != f"modules.{site.kind}" else ""
    is_none = site.action == "partial" and not counts["partial"]
    small = ": its share is less than one token" if is_none else ""
    return f"{', '.join(parts)} of {total} steps{small}{rule}"


def _site_lines(sites: Sequence[SiteExplanation]) -> Iterator[str]:
    groups: dict[tuple[object, ...], list[SiteExplanation]] = {}
    for site in sites:
        does = (site.kind, site.tokens, site.modes, site.action, site.says, site.gathers)
        by = (_pattern(site.influence or ""), _pattern(site.entropy or ""), site.scores)
        key = (_pattern(site.path), *does, *by)
        groups.setdefault(key, []).append(site)
    if not groups:
        yield "no sites: the model would run uncached"
        return
    names = [_joined([site.path for site in group]) for group in groups.values()]
    width, widest = max(map(len, names)), max(len(str(site.tokens)) for site in sites)
    for name, group in zip(names, groups.values(), strict=True):
        site = group[0]
        tokens = f"{site.tokens:>{widest}} tokens"
        yield f"{name:<{width}}  {site.kind:<15}  {tokens}  {describe(group)}"
        if "partial" in site.modes:
            yield f"{'':<{width}}  chosen by {', '.join(_scores(site))}"
        for gather in site.gathers:
            yield f"{'':<{width}}  {gather}"


def _scores(site: SiteExplanation) -> Iterator[str]:
    """The scores that choose a site's tokens, and the attentions that they come from."""
    for score, weight in site.scores:
        made_of = SCORES[score].source
        if made_of is None:
            yield f"{score}: {weight:g}"
            continue
        source: str | None = getattr(site, made_of)
        given = "nothing gives it" if source is None else f"of {_pattern(source)}"
        yield f"{score}: {weight:g} ({given})"
    if not site.scores:
        yield "position, all scores being 0"


def _skipped_lines(skipped: Sequence[Skipped]) -> Iterator[str]:
    groups: dict[tuple[str, ...], list[Skipped]] = {}
    for miss in skipped:
        # Behind ", but" come the operators found, which may differ a little between the first block
        # and the others.
        key = (_pattern(miss.path), miss.kind, miss.reason.partition(", but ")[0], miss.advice)
        groups.setdefault(key, []).append(miss)
    for group in groups.values():
        first = group[0]
        name = _joined([miss.path for miss in group]) or "(top level)"
        yield f"  {name}  {first.kind}: {first.reason}"
        if first.advice:
            yield f"    {first.advice}"


def _suggestions(sites: Sequence[SiteExplanation]) -> Iterator[str]:
    """One rule per group of sites that the policy computes on every step.

    It names layers if other sites of the same pattern are cached.
    """
    computed: dict[tuple[str, str], list[int]] = {}
    for site in sites:
        if site.action == "compute":
            computed.setdefault((site.kind, _pattern(site.path)), []).append(site.layer)
    for (kind, pattern), layers in computed.items():
        what = "{weight: 1.0}" if kind == "mlp" else "reuse"
        others = [
            site
            for site in sites
            if (site.kind, _pattern(site.path)) == (kind, pattern) and site.action != "compute"
        ]
        for first, last in _ranges(layers) if others else [(0, 0)]:
            only = f", layers: {_span(first, last)}" if others else ""
            yield f'- {{match: {kind}, path: "{pattern}"{only}, module: {what}}}'


def _pattern(path: str) -> str:
    """A path without its number: ``transformer_blocks.3.ff`` -> ``transformer_blocks.*.ff``."""
    return _NUMBER.sub("*", path, count=1)


def _joined(paths: Sequence[str]) -> str:
    """Paths of one pattern as one name: ``transformer_blocks.0-27.ff``."""
    layers = [int(found.group()) for path in paths if (found := _NUMBER.search(path))]
    spans = ",".join(_span(first, last) for first, last in _ranges(layers))
    return _NUMBER.sub(spans, paths[0], count=1)


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """The runs of consecutive numbers, each by its first and last."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _span(first: int, last: int, dash: str = "-") -> str:
    return str(first) if first == last else f"{first}{dash}{last}"
