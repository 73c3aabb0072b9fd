"""Results as tables and as a chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from toca_fx.bench.result import BenchResult, Kind, seconds_of


def show(result: BenchResult, console: Console) -> None:
    """Print the result as tables."""
    mode = "" if result.mode is None else f", mode {result.mode}"
    images = "" if result.images == 1 else f", {result.images} images"
    console.print(
        _steps(result, f"{result.case}{images}, policy {result.policy}{mode}, {result.steps} steps")
    )
    figures = Table(show_header=False)
    for name, figure in _figures(result):
        figures.add_row(name, figure)
    console.print(figures)


def _steps(result: BenchResult, title: str) -> Table:
    """A row for each kind of step; the host's time has a column if it is another."""
    rows = [
        (found.name.replace("torch.compile", "uncached"), found.step) for found in result.baselines
    ]
    rows += [(kind.kind, kind) for kind in _shown(result.kinds)]
    behind = any(kind.host != kind.seconds for _, kind in rows)
    table = Table(title=title)
    for column in (
        "step",
        "fresh tokens",
        "time",
        *["host"] * behind,
        "of uncached",
        "FLOPs of uncached",
        "least time by roofline",
    ):
        table.add_column(
            column,
            justify="left" if column == "step" else "right",
            min_width=len("uncached,") if column == "step" else None,
        )
    for name, kind in rows:
        least = result.limits.seconds(kind.flops, kind.bytes)
        share, work = kind.seconds / result.uncached.seconds, kind.flops / result.uncached.flops
        fresh = {"uncached": "all", "full": "all", "skip": "none"}.get(kind.kind)
        times = [_ms(kind.seconds), *[_ms(kind.host)] * behind]
        table.add_row(
            name,
            fresh or f"{kind.fresh:.1f}",
            *times,
            f"{share:.3f}",
            f"{work:.3f}",
            f"{least / kind.seconds:.0%}",
        )
    return table


def _figures(result: BenchResult) -> Iterator[tuple[str, str]]:
    yield "latency ratio", f"{result.latency_ratio:.3f}x"
    yield "FLOPs ratio", f"{result.flops_ratio:.3f}x"
    yield "quotient", f"{result.quotient:.3f}"
    if len(result.baselines) > 1:
        yield "compared with the fastest of the uncached", result.baseline
    for baseline in result.baselines:
        yield f"generation, {baseline.name}", f"{baseline.generation:.3f} s"
    yield "generation, toca_fx", f"{result.generation:.3f} s"
    launched = [(baseline.name, baseline.step.launches) for baseline in result.baselines]
    launched += {f"{kind.kind} step": kind.launches for kind in result.kinds}.items()
    for name, launches in launched:
        if launches is not None:
            yield f"launches, {name}", str(launches)
    for kind, counts in result.recordings.items():
        yield f"{kind} steps", "; ".join(f"{count} {how}" for how, count in counts.items())
    partial = seconds_of(result.kinds, "partial") or float("nan")
    full = seconds_of(result.kinds, "full")
    if result.selection:
        yield (
            "choosing tokens ahead of a partial step",
            f"{_ms(result.selection, 2)} ({result.selection / partial:.1%})",
        )
    if result.scoring is not None and result.scoring_full is not None:
        yield (
            "scoring tokens in a partial step",
            f"{_ms(result.scoring, 2)} ({result.scoring / partial:.1%})",
        )
        yield (
            "scoring tokens in a full step",
            f"{_ms(result.scoring_full, 2)} ({result.scoring_full / full:.1%})",
        )
    for baseline in result.baselines:
        yield f"first calls, {baseline.name}", f"{baseline.compile_seconds:.1f} s"
    yield "first calls, all step kinds", f"{result.compile_toca:.1f} s"
    yield "caches", _mib(result.cache_bytes)
    yield "hoisted values", _mib(result.hoisted_bytes)
    if result.memory is not None:
        yield "weights and inputs", _mib(result.memory.held)
        yield "peak memory above them, uncached", _mib(result.memory.uncached)
        yield "peak memory above them, toca_fx", _mib(result.memory.toca)
    if result.peak_bytes is not None:
        yield "peak memory", f"{result.peak_bytes / 2**30:.2f} GiB"
    for other in result.alternatives:
        fewer = "" if other.flops_ratio is None else f" for {other.flops_ratio:.3f}x fewer FLOPs"
        yield f"instead: {other.name}", f"{other.latency_ratio:.3f}x{fewer}"
    for name, reason in result.failed.items():
        yield f"instead: {name}", f"does not run: {reason}"


def _ms(seconds: float, digits: int | None = None) -> str:
    """A time in milliseconds as text; short times have more digits."""
    if digits is None:
        digits = 1 if seconds >= 0.01 else 2
    return f"{seconds * 1e3:.{digits}f} ms"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def _shown(kinds: Sequence[Kind]) -> list[Kind]:
    """Of each kind the steps of least, middle and most work, as partial steps may be many."""
    shown: list[Kind] = []
    for name in dict.fromkeys(kind.kind for kind in kinds):
        same = [kind for kind in kinds if kind.kind == name]
        shown += [same[at] for at in sorted({0, len(same) // 2, len(same) - 1})]
    return shown


def chart(results: Sequence[BenchResult], path: str) -> None:
    """Draw FLOPs against time of each kind of step, and save the picture at ``path``.

    Lines show time that falls as work does, and the roofline of the machine. On a GPU the host's
    time is drawn too: if it is above that of the device, it is the limit.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 4.2), squeeze=False, layout="constrained"
    )
    for result, ax in zip(results, axes[0], strict=True):
        full = result.uncached
        ax.plot(
            [0, 1.2],
            [0, 1.2 * full.seconds * 1e3],
            color="0.7",
            linewidth=1,
            label="time falls as work does",
        )
        every = (full, *result.kinds)
        limit = sorted(
            (kind.flops / full.flops, result.limits.seconds(kind.flops, kind.bytes) * 1e3)
            for kind in every
        )
        ax.plot(
            *zip(*limit, strict=True),
            color="C3",
            linewidth=1,
            linestyle=":",
            label="roofline: compute or bandwidth",
        )
        ax.plot(1, full.seconds * 1e3, "ko", label=result.baseline)
        for at, name in enumerate(dict.fromkeys(kind.kind for kind in result.kinds)):
            same = [kind for kind in result.kinds if kind.kind == name]
            work = [kind.flops / full.flops for kind in same]
            times = [kind.seconds * 1e3 for kind in same]
            ax.plot(work, times, "os^."[at % 4], color=f"C{at}", label=name)
            if any(kind.host != kind.seconds for kind in same):
                times = [kind.host * 1e3 for kind in same]
                ax.plot(work, times, "x", color=f"C{at}", label=f"{name}, host")
        ax.set(
            xlabel="FLOPs, of the uncached step",
            ylabel="time of a step (ms)",
            xlim=(0, 1.15),
            ylim=(0, None),
        )
        ax.set_title(
            f"{result.case}: {result.latency_ratio:.2f}x time, {result.flops_ratio:.2f}x FLOPs",
            fontsize=10,
        )
        ax.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
