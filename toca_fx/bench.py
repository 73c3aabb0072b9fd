"""``toca-fx bench``: time saved against work saved, beside ``torch.compile(model)`` with fused attention.

Both sides are compiled by inductor, in one process, and their steps alternate, so that both see the same machine.
Reported are medians over rounds; the first round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import toca_fx

if TYPE_CHECKING:
    from toca_fx.policy import Policy


@dataclass(frozen=True)
class BenchResult:
    """All times in seconds, per model call unless said otherwise. ``kinds`` maps a step kind to its median time."""

    policy: str
    steps: int
    uncached_step: float
    kinds: dict[str, float]
    selection_step: float
    latency_ratio: float
    flops_ratio: float
    compile_uncached: float
    compile_toca: float
    cache_bytes: int

    @property
    def quotient(self) -> float:
        """Latency ratio over FLOPs ratio: 1 when time falls as much as work does."""
        return self.latency_ratio / self.flops_ratio


def build_dit(hidden: int, blocks: int, tokens: int) -> nn.Module:
    """A DiT of the diffusers class with random weights; ``tokens`` is a square number."""
    from toca_fx.integrations.diffusers.parts import dit

    side = int(tokens**0.5)
    if side * side != tokens or hidden % 64:
        raise SystemExit("bench: --tokens has to be a square number and --hidden a multiple of 64")
    torch.manual_seed(0)
    model = dit(
        num_attention_heads=hidden // 64,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        sample_size=2 * side,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_eps=1e-6,
    )
    return model.eval()


@torch.no_grad()
def run_bench(model: nn.Module, policy: Policy, shape: tuple[int, ...], rounds: int, on_step: Any = lambda: None) -> BenchResult:
    """Alternate uncached and cached steps over ``rounds`` generations (after one that warms up); ``shape`` is the latents'."""
    steps = policy.sampler.steps
    batch = shape[0]
    latents = torch.randn(steps, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(batch)
    uncached = torch.compile(model, fullgraph=True)
    fast = toca_fx.compile(model, policy)

    def call(module: Any, step: int) -> float:
        timestep = torch.full((batch,), 999 - step * 1000 // steps)
        began = time.perf_counter()
        output: Tensor = module(latents[step], timestep=timestep, class_labels=labels, return_dict=False)[0]
        float(output.sum())  # waits for the device
        return time.perf_counter() - began

    compile_uncached = call(uncached, 0)
    uncached_times: list[list[float]] = [[] for _ in range(steps)]
    cached_times: list[list[float]] = [[] for _ in range(steps)]
    compile_toca = 0.0
    for round_index in range(rounds + 1):
        with toca_fx.session(num_steps=steps) as run:
            for step in range(steps):
                plain, cached = call(uncached, step), call(fast, step)
                if round_index:
                    uncached_times[step].append(plain)
                    cached_times[step].append(cached)
                on_step()
        if not round_index:
            first = [record.seconds for record in run.report().steps]
            compile_toca = sum(sorted(first)[-run.report().compiled_graphs :])
    report = run.report()
    plain_medians = [statistics.median(times) for times in uncached_times]
    cached_medians = [statistics.median(times) for times in cached_times]
    kinds = {
        kind: statistics.median(t for t, record in zip(cached_medians, report.steps, strict=True) if record.kind == kind)
        for kind in dict.fromkeys(record.kind for record in report.steps)
    }
    return BenchResult(
        policy=policy.name,
        steps=steps,
        uncached_step=statistics.median(plain_medians),
        kinds=kinds,
        selection_step=report.selection_seconds / max(1, sum(r.kind != "full" for r in report.steps)),
        latency_ratio=sum(plain_medians) / sum(cached_medians),
        flops_ratio=report.flops_ratio,
        compile_uncached=compile_uncached,
        compile_toca=compile_toca,
        cache_bytes=report.cache_bytes,
    )


def show(result: BenchResult, console: Console) -> None:
    """Print the result as a table."""
    table = Table(title=f"policy {result.policy}, {result.steps} steps", show_header=False)
    table.add_row("uncached step", f"{result.uncached_step * 1e3:.1f} ms")
    for kind, seconds in result.kinds.items():
        table.add_row(f"{kind} step", f"{seconds * 1e3:.1f} ms  ({seconds / result.uncached_step:.3f}x uncached)")
    table.add_row("selection, per partial step", f"{result.selection_step * 1e3:.2f} ms")
    table.add_row("latency ratio", f"{result.latency_ratio:.3f}x")
    table.add_row("FLOPs ratio", f"{result.flops_ratio:.3f}x")
    table.add_row("quotient", f"{result.quotient:.3f}")
    table.add_row("compile time, uncached", f"{result.compile_uncached:.1f} s")
    table.add_row("compile time, all step kinds", f"{result.compile_toca:.1f} s")
    table.add_row("caches", f"{result.cache_bytes / 2**20:.1f} MiB")
    console.print(table)


def main(args: argparse.Namespace) -> int:
    """Run the benchmark as ``args`` say."""
    torch.set_num_threads(args.threads)
    policy = toca_fx.load_policy(args.policy)
    model = build_dit(args.hidden, args.blocks, args.tokens)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("generations", total=(args.rounds + 1) * policy.sampler.steps)
        side = 2 * int(args.tokens**0.5)
        result = run_bench(model, policy, (args.batch, 4, side, side), args.rounds, on_step=lambda: progress.advance(task))
    show(result, console)
    if args.json:
        machine = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine(), "threads": args.threads}
        shapes = {name: getattr(args, name) for name in ("hidden", "blocks", "tokens", "batch", "rounds")}
        Path(args.json).write_text(json.dumps({**asdict(result), "quotient": result.quotient, **shapes, **machine}, indent=2) + "\n")
    return 0
