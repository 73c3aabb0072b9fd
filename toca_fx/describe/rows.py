"""The lines of a page about sites and near misses.

Equal rows of the blocks of one list are joined into one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from toca_fx.describe.site import SiteExplanation, describe, span_of
from toca_fx.plan.scores import SCORES

WHOLE_MODEL = "(the model)"

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of the outermost block list in a module path


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


def mib(nbytes: int) -> str:
    """Bytes as text, in MiB."""
    return f"{nbytes / 2**20:.1f}"


def site_lines(sites: Sequence[SiteExplanation]) -> Iterator[str]:
    """A row for each group of sites that are alike, and lines below it."""
    groups: dict[tuple[object, ...], list[SiteExplanation]] = {}
    for site in sites:
        does = (site.kind, site.tokens, site.modes, site.action, site.says, site.gathers)
        by = (_pattern(site.influence or ""), _pattern(site.entropy or ""), site.scores)
        key = (_pattern(site.path), *does, *by, site.kept and replace(site.kept, nbytes=0))
        groups.setdefault(key, []).append(site)
    if not groups:
        yield "no sites: the model would run uncached"
        return
    names = [_joined([site.path for site in group]) or WHOLE_MODEL for group in groups.values()]
    width, widest = max(map(len, names)), max(len(str(site.tokens)) for site in sites)
    for name, group in zip(names, groups.values(), strict=True):
        site = group[0]
        tokens = f"{site.tokens:>{widest}} tokens"
        yield f"{name:<{width}}  {site.kind:<15}  {tokens}  {describe(group)}"
        if "partial" in site.modes:
            yield f"{'':<{width}}  chosen by {', '.join(_scores(site))}"
        nbytes, kept = sum(each.kept.nbytes for each in group if each.kept), site.kept
        if nbytes and kept and (kept.history > 1 or kept.grain != "module"):
            yield f"{'':<{width}}  {mib(nbytes)} MiB: {kept}"
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


def skipped_lines(skipped: Sequence[Skipped]) -> Iterator[str]:
    """A row for each group of near misses that are alike."""
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


def suggestions(sites: Sequence[SiteExplanation]) -> Iterator[str]:
    """One rule per group of sites that the policy computes on every step.

    It names layers if other sites of the same pattern are cached.
    """
    computed: dict[tuple[str, str], list[int]] = {}
    for site in sites:
        if site.action == "compute" and not site.is_left_out:
            computed.setdefault((site.kind, _pattern(site.path)), []).append(site.layer)
    for (kind, pattern), layers in computed.items():
        what = "{weight: 1.0}" if kind == "mlp" else "reuse"
        others = [
            site
            for site in sites
            if (site.kind, _pattern(site.path)) == (kind, pattern) and site.action != "compute"
        ]
        for first, last in _ranges(layers) if others else [(0, 0)]:
            only = f", layers: {span_of(first, last)}" if others else ""
            yield f'- {{match: {kind}, path: "{pattern}"{only}, module: {what}}}'


def _pattern(path: str) -> str:
    """A path without its number: ``transformer_blocks.3.ff`` -> ``transformer_blocks.*.ff``."""
    return _NUMBER.sub("*", path, count=1)


def _joined(paths: Sequence[str]) -> str:
    """Paths of one pattern as one name: ``transformer_blocks.0-27.ff``."""
    layers = [int(found.group()) for path in paths if (found := _NUMBER.search(path))]
    spans = ",".join(span_of(first, last) for first, last in _ranges(layers))
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
