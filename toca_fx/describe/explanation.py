"""The result of ``toca_fx.explain``: data, and a page of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from toca_fx.describe.rows import Skipped, mib, site_lines, skipped_lines, suggestions
from toca_fx.describe.site import SiteExplanation


@dataclass(frozen=True)
class KindExplanation:
    """The steps of one kind: how many, and their work on average, as a share of an uncached step.

    Values that are computed ahead of them count where they are read.
    """

    kind: str
    count: int
    share: float


@dataclass(frozen=True)
class Explanation:
    """What ``toca_fx.explain`` returns; ``str()`` gives a page to read, ``to_dict()`` everything.

    ``steps`` are (s, kind) in the order of the calls; the FLOPs are those of all steps. Where a
    gate decides, both are of as few full steps as it may leave, and ``full_range`` is how many may
    be full, from least to most. ``uncut`` says why the output layers cannot be cut off, so that a
    memory of the model is one of its output ("" if they can). ``cache_bytes`` is what one guidance
    branch keeps, histories included, ``hoisted_bytes`` what it computes ahead of the steps, of one
    timestep. ``peak_bytes`` is all that a generation of one branch adds to the weights at its peak
    on a GPU, rounded as its allocator does. ``step_bytes`` of it is what the worst step takes while
    it runs; ``listed_bytes`` comes on top in a session that knows its timesteps. On a GPU steps are
    recorded, and then keep ``recordable_bytes`` between generations, unless ``queued_because`` says
    why not. ``passes`` are lines on what each pass did, by kind of step. Where weights are away
    between calls, ``moved_bytes`` are what each call brings in, in a session that is told its
    timesteps, and ``offloaded_bytes`` what each call of the model as it is brings in.
    """

    model: str
    policy: str
    steps: tuple[tuple[int, str], ...]
    full_range: tuple[int, int]
    kinds: tuple[KindExplanation, ...]
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
    uncut: str = ""
    passes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    offloaded_bytes: int = 0
    moved_bytes: tuple[int, ...] = ()

    @property
    def flops_ratio(self) -> float:
        """Uncached FLOPs over done FLOPs: the factor by which work falls."""
        return self.flops_uncached / self.flops_done if self.flops_done else 1.0

    @property
    def suggestions(self) -> tuple[str, ...]:
        """Rules for a policy that would include what it now computes on every step."""
        return tuple(suggestions(self.sites))

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready data, every site by itself."""
        return {
            "model": self.model,
            "policy": self.policy,
            "steps": [{"index": index, "kind": kind} for index, kind in self.steps],
            "full_steps": list(self.full_range),
            "kinds": [asdict(each) for each in self.kinds],
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
            "offloaded_bytes": self.offloaded_bytes,
            "moved_bytes": list(self.moved_bytes),
            "passes": {kind: list(reports) for kind, reports in self.passes},
            "uncut": self.uncut,
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        counts = [f"{each.count} {each.kind}" for each in self.kinds]
        shares = [f"{each.kind} {each.share:.2%}" for each in self.kinds]
        lines = [
            f"model      {self.model or '(no module)'}",
            f"policy     {self.policy}",
            f"steps      {len(self.steps)}: {', '.join(counts)}",
            *self._gate(),
            f"work       {', '.join(shares)} of an uncached step",
            f"FLOPs      {self.flops_done:.3e} of {self.flops_uncached:.3e} uncached "
            f"({self.flops_ratio:.2f}x fewer)",
            f"caches     {mib(self.cache_bytes)} MiB, and {mib(self.hoisted_bytes)} MiB of "
            "hoisted values",
            f"memory     {self._memory()}",
            f"on a GPU   {self._launch()}",
            *self._offload(),
            *([f"grain      of the model: its output only, as {self.uncut}"] if self.uncut else []),
            "",
            *site_lines(self.sites),
        ]
        if self.skipped:
            lines += ["", "not matched, and so computed on every step:"]
            lines += skipped_lines(self.skipped)
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

    def _offload(self) -> Iterator[str]:
        if self.moved_bytes:
            uncached = self.offloaded_bytes * len(self.steps)
            yield (
                f"offload    {mib(sum(self.moved_bytes))} MiB of weights brought in, of "
                f"{mib(uncached)} uncached"
            )

    def _memory(self) -> str:
        rounding = self.peak_bytes - self.cache_bytes - self.hoisted_bytes - self.step_bytes
        text = (
            f"{mib(self.peak_bytes)} MiB at the peak, of which {mib(self.step_bytes)} are a "
            f"step's own and {mib(rounding)} lost by rounding"
        )
        if self.listed_bytes:
            text += f"; {mib(self.listed_bytes)} more if the session is told its timesteps"
        return text

    def _launch(self) -> str:
        if self.queued_because:
            return f"queued kernel by kernel: {self.queued_because}"
        kept = mib(self.recordable_bytes)
        return f"recorded: one launch a step; keeps {kept} MiB between generations"
