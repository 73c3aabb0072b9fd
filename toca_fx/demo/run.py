"""``toca-fx demo``: the same digits uncached, cached, and by what else takes as little time.

That is fewer steps, and a better solver with as many.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

import toca_fx
from toca_fx.demo import digits

Denoiser = Callable[..., tuple[Tensor, ...]]

TOKENS = "reference/toca-digits"
"""The policy that is shown beside: ToCa, which computes some tokens between full steps."""


@dataclass(frozen=True)
class Outcome:
    """One way to generate the digits, and what came of it.

    ``images`` are [B, 1, 32, 32], ``seconds`` is wall time, ``agreement`` the share that the
    classifier recognises (0 to 1), ``psnr`` is in dB.
    """

    label: str
    images: Tensor
    seconds: float
    agreement: float
    psnr: float | None
    flops_ratio: float

    @property
    def caption(self) -> str:
        """The figures on one line."""
        psnr = "" if self.psnr is None else f", PSNR {self.psnr:.1f} dB"
        return f"{self.seconds:.1f} s{psnr}, {self.agreement:.0%} recognised"


def main(args: argparse.Namespace) -> int:
    """Run the demo as ``args`` say; writes the picture and prints the table."""
    policy = toca_fx.load_policy(args.policy)
    steps = policy.sampler.steps
    classes = torch.arange(10).repeat_interleave(args.per_class)
    denoiser, classifier = digits.load_denoiser(), digits.load_classifier()
    uncached = torch.compile(denoiser, fullgraph=True, dynamic=False)
    tokens = replace(toca_fx.load_policy(TOKENS), sampler=policy.sampler)
    cached, by_tokens = toca_fx.compile(denoiser, policy), toca_fx.compile(denoiser, tokens)
    console, outcomes, reports = Console(), list[Outcome](), dict[str, str]()

    with Progress(console=console) as progress:

        def generate(label: str, model: Denoiser, count: int, scheduler: Any = None) -> Outcome:
            """Sample in ``count`` steps; the first outcome is what the others are compared with."""
            task = progress.add_task(f"{label}, {count} steps", total=count)
            known = toca_fx.session(timesteps=digits.timesteps(count))
            with nullcontext() if model is uncached else known as run:
                began = time.perf_counter()
                images = digits.sample(
                    model,
                    classes,
                    steps=count,
                    seed=args.seed,
                    scheduler=scheduler,
                    on_step=lambda: progress.advance(task),
                )
                seconds = time.perf_counter() - began
            images = images.clamp(-1, 1)
            found = Outcome(
                f"{label}, {count} steps",
                images,
                seconds,
                recognised(classifier, images, classes),
                psnr(outcomes[0].images, images) if outcomes else None,
                steps / count if run is None else run.report().flops_ratio,
            )
            outcomes.append(found)
            if run is not None:
                reports[label] = str(run.report())
            return found

        warm_up(progress, [uncached, by_tokens, cached], classes, steps)
        whole = generate("uncached", uncached, steps)
        generate("ToCa", by_tokens, steps)
        ours = generate(policy.name, cached, steps)
        fewer = max(1, round(steps * ours.seconds / whole.seconds))
        generate("uncached", uncached, fewer)
        generate("DPM-Solver++", uncached, fewer, digits.build_solver())

    console.print(table(outcomes))
    console.print(reports[policy.name], highlight=False)
    draw(outcomes, args.per_class, args.output)
    console.print(f"wrote {args.output}", soft_wrap=True)
    return 0


def warm_up(progress: Progress, models: list[Denoiser], classes: Tensor, steps: int) -> None:
    """Compile everything before it is timed, by calls like those that will be: full and partial."""
    few = 4
    task = progress.add_task("compiling", total=few * len(models))
    known = [*digits.timesteps(few), *[0] * (steps - few)]
    for model in models:
        with toca_fx.session(timesteps=known) as run:
            digits.sample(model, classes, steps=few, on_step=lambda: progress.advance(task))
            run.close()  # otherwise a warning would say that steps are missing


@torch.no_grad()
def recognised(classifier: nn.Module, images: Tensor, classes: Tensor) -> float:
    """The share of images that the classifier takes for the class that was asked for."""
    right: Tensor = classifier(images).argmax(1) == classes
    return right.double().mean().item()


def psnr(reference: Tensor, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; the data range is [-1, 1]."""
    return float(peak_signal_noise_ratio(reference.numpy(), images.numpy(), data_range=2.0))


def table(outcomes: list[Outcome]) -> Table:
    """A table with a column per outcome: wall time, ratios, PSNR and agreement."""
    result = Table("", *(outcome.label.replace(", ", "\n") for outcome in outcomes))
    for column in result.columns[1:]:
        column.justify = "right"
    result.add_row("wall time", *(f"{outcome.seconds:.1f} s" for outcome in outcomes))
    ratios = [outcomes[0].seconds / outcome.seconds for outcome in outcomes]
    result.add_row("latency ratio", *(f"{ratio:.2f}x" for ratio in ratios))
    result.add_row("FLOPs ratio", *(f"{outcome.flops_ratio:.2f}x" for outcome in outcomes))
    result.add_row(
        "PSNR vs uncached",
        *("-" if outcome.psnr is None else f"{outcome.psnr:.1f} dB" for outcome in outcomes),
    )
    result.add_row("recognised", *(f"{outcome.agreement:.1%}" for outcome in outcomes))
    return result


def draw(outcomes: list[Outcome], per_class: int, path: str) -> None:
    """Draw one grid of digits per outcome, side by side, with a row per class."""
    figure, axes = plt.subplots(
        1, len(outcomes), figsize=(1.15 * per_class * len(outcomes), 12), layout="constrained"
    )
    for axis, outcome in zip(axes, outcomes, strict=True):
        framed = torch.nn.functional.pad(outcome.images, (2, 2, 2, 2), value=-0.5)
        side = framed.shape[-1]
        rows = framed.reshape(10, per_class, side, side).transpose(1, 2)
        grid = rows.reshape(10 * side, per_class * side)
        axis.imshow(grid.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(f"{outcome.label}\n{outcome.caption}", fontsize=10)
        axis.set_axis_off()
    figure.savefig(path, dpi=100)
    plt.close(figure)
