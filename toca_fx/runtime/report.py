"""What a generation did and what it saved: data, and a readable table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from toca_fx.lower.program import Program
from toca_fx.plan.plan import KINDS, Plan, StepPlan
from toca_fx.runtime.schedules import Timestep


@dataclass(frozen=True)
class Launch:
    """How a step was launched: "recorded", as one CUDA graph, or "queued" kernel by kernel.

    ``reason`` says why it was queued, and is "" on a CPU.
    """

    how: str
    reason: str


@dataclass(frozen=True)
class StepRecord:
    """One model call. ``index`` is s of the policy, ``step`` what the call did.

    ``plan`` is that of its generation. ``seconds`` is the whole call on the host's clock,
    ``selection_seconds`` the part that chose tokens (0 for a recorded step: it is part of the
    recording). ``beside_flops`` is what the call spent beside its step graph: on values that do
    not depend on the latents, and on what a gate measures. ``reason`` says why it is of its kind:
    "planned", "nothing kept" or "in doubt", or what a gate saw. ``timestep`` is the model's, if it
    is known. Of a pipeline ``component`` is the name of the model, and ``run`` the number of the
    run in the call. ``moved_bytes`` are those of the weights that were away and were brought in
    for it. ``beside`` says that it was a part of a model without sites, captured apart.
    """

    index: int
    kind: str
    branch: str
    seconds: float
    selection_seconds: float
    step: StepPlan
    plan: Plan
    beside_flops: int
    launch: Launch = Launch("queued", "")
    reason: str = "planned"
    timestep: Timestep | None = None
    component: str = ""
    run: int = 0
    moved_bytes: int = 0
    beside: bool = False


@dataclass(frozen=True)
class SiteRecord:
    """A site of the model and the tokens per sample it computed on each call.

    The model itself is a site of kind "state" or "output", with an empty path, where its memory
    makes steps that run no block.
    """

    path: str
    kind: str
    layer: int
    tokens: int
    computed: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What ``session.report()`` returns: calls, sites, work and memory.

    ``step_flops`` are the FLOPs of the step graph of each call. ``flops_uncached`` is what as many
    calls of the uncached model cost. ``cache_bytes`` are those of caches, histories with their
    weights, scores and counters, ``hoisted_bytes`` those of values computed ahead of the steps.
    ``notes`` are worth knowing and nothing to mend: what of a pipeline is not compiled, say.
    """

    steps: tuple[StepRecord, ...]
    sites: tuple[SiteRecord, ...]
    step_flops: tuple[int, ...]
    flops_uncached: int
    cache_bytes: int
    hoisted_bytes: int
    compiled_graphs: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def flops_done(self) -> int:
        """FLOPs of all calls, hoisted values included."""
        return sum(self.step_flops) + sum(step.beside_flops for step in self.steps)

    @property
    def moved_bytes(self) -> int:
        """Bytes of weights that all calls have brought in from where offloading had put them."""
        return sum(step.moved_bytes for step in self.steps)

    @property
    def seconds(self) -> float:
        """Wall time of all calls."""
        return sum(step.seconds for step in self.steps)

    @property
    def selection_seconds(self) -> float:
        """Wall time spent choosing tokens, part of ``seconds``."""
        return sum(step.selection_seconds for step in self.steps)

    @property
    def flops_ratio(self) -> float:
        """Uncached FLOPs over done FLOPs: the factor by which work fell."""
        return self.flops_uncached / self.flops_done if self.flops_done else 1.0

    @property
    def kinds(self) -> dict[str, int]:
        """How many steps there were of each kind: full, mixed, partial, skip."""
        counts = Counter(step.kind for step in self.steps)
        return {kind: counts[kind] for kind in KINDS if counts[kind]}

    @property
    def launches(self) -> dict[str, dict[str, int]]:
        """How many steps of each kind were recorded, or queued for which reason; {} on a CPU."""
        found: dict[str, dict[str, int]] = {}
        for step in self.steps:
            if step.launch.how == "recorded" or step.launch.reason:
                says = ": ".join(filter(None, (step.launch.how, step.launch.reason)))
                counts = found.setdefault(step.kind, {})
                counts[says] = counts.get(says, 0) + 1
        return found

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return {
            "steps": [
                {
                    "index": s.index,
                    "kind": s.kind,
                    "reason": s.reason,
                    "run": s.run,
                    "component": s.component,
                    "branch": s.branch,
                    "timestep": None if s.timestep is None else [*s.timestep],
                    "seconds": s.seconds,
                    "moved_bytes": s.moved_bytes,
                }
                for s in self.steps
            ],
            "kinds": self.kinds,
            "sites": [
                {
                    "path": s.path,
                    "kind": s.kind,
                    "layer": s.layer,
                    "tokens": s.tokens,
                    "computed": list(s.computed),
                }
                for s in self.sites
            ],
            "flops": {"done": self.flops_done, "uncached": self.flops_uncached},
            "cache_bytes": self.cache_bytes,
            "hoisted_bytes": self.hoisted_bytes,
            "moved_bytes": self.moved_bytes,
            "seconds": self.seconds,
            "selection_seconds": self.selection_seconds,
            "compiled_graphs": self.compiled_graphs,
            "launches": self.launches,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [
            f"{len(self.steps)} steps: "
            + ", ".join(f"{count} {kind}" for kind, count in self.kinds.items()),
            f"FLOPs      {self.flops_done:.3e} of {self.flops_uncached:.3e} uncached "
            f"({self.flops_ratio:.2f}x fewer)",
            f"time       {self.seconds:.2f} s, of which {self.selection_seconds:.3f} s selecting "
            "tokens",
            f"caches     {self.cache_bytes / 2**20:.1f} MiB, and "
            f"{self.hoisted_bytes / 2**20:.1f} MiB of hoisted values",
            f"graphs     {self.compiled_graphs} compiled",
        ]
        if self.moved_bytes:
            lines.append(f"offload    {self.moved_bytes / 2**20:.1f} MiB of weights brought in")
        for kind, counts in self.launches.items():
            lines.append(
                f"launches   {kind}: "
                + "; ".join(f"{count} {says}" for says, count in counts.items())
            )
        lines += _site_table(self.sites)
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


Recorded: TypeAlias = tuple[Program, StepRecord]
"""A call, with the program that ran it."""


def make_report(
    calls: Sequence[Recorded],
    cache_bytes: int,
    hoisted_bytes: int,
    warnings: Sequence[str],
) -> Report:
    """The report on ``calls``, each of which comes with the program that ran it.

    Parts of a model that lie ahead of its blocks, or behind, are no steps of their own.
    """
    calls = [call for call in calls if not call[1].beside] or calls
    programs = list(dict.fromkeys(program for program, _ in calls))
    return Report(
        steps=tuple(record for _, record in calls),
        sites=tuple(
            SiteRecord(
                site.path,
                site.kind,
                site.layer,
                site.tokens,
                tuple(
                    record.step.fresh[i] if record.plan.sites else site.tokens
                    for other, record in calls
                    if other is program
                ),
            )
            for program in programs
            for i, site in enumerate(_plan(program, calls).sites or program.analysis.matches.sites)
        ),
        step_flops=tuple(program.step_flops(record.plan, record.step) for program, record in calls),
        flops_uncached=sum(program.analysis.uncached_flops for program, _ in calls),
        cache_bytes=cache_bytes,
        hoisted_bytes=hoisted_bytes,
        compiled_graphs=sum(program.compiled_graphs for program in programs),
        warnings=tuple(warnings),
        notes=tuple(dict.fromkeys(note for program in programs for note in program.notes)),
    )


def _plan(program: Program, calls: Sequence[Recorded]) -> Plan:
    """A plan that a program ran by, one with sites if there was one: the uncached plan has none."""
    plans = [record.plan for other, record in calls if other is program]
    return next((plan for plan in plans if plan.sites), plans[0])


def least_bytes(
    calls: Sequence[Recorded],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The bytes that each call has to move at least: of the uncached model, and of our step.

    They are those of weights, inputs and caches.
    """
    uncached = tuple(program.analysis.uncached_bytes for program, _ in calls)
    return uncached, tuple(
        program.step_bytes(record.plan, record.step) for program, record in calls
    )


def _site_table(sites: Sequence[SiteRecord]) -> list[str]:
    """One line per kind of site: how many, and which share of their tokens was computed."""
    if not sites:
        return ["no sites: the model ran uncached"]
    lines = [f"{'site':<18}{'count':>6}{'tokens':>8}{'computed':>10}"]
    for kind in dict.fromkeys(site.kind for site in sites):
        members = [site for site in sites if site.kind == kind]
        possible = sum(site.tokens * len(site.computed) for site in members)
        share = sum(sum(site.computed) for site in members) / possible if possible else 0.0
        tokens = "/".join(str(count) for count in dict.fromkeys(site.tokens for site in members))
        lines.append(f"{kind:<18}{len(members):>6}{tokens:>8}{share:>10.1%}")
    return lines
