"""Measure one point: sample with it, and compare."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import toca_fx
from toca_fx.demo import digits
from tools.frontier import measures
from tools.frontier.peers import Cached
from tools.frontier.points import Point
from tools.frontier.results import Row
from tools.frontier.setups import STEPS, Denoiser, Setup


@dataclass(frozen=True)
class Bench:
    """Samples with a setup from the noise of ``seed``, and keeps uncached images in ``folder``.

    Models run eagerly, which changes no image by more than rounding does; policies do all else
    that they do for users.
    """

    setup: Setup
    seed: int
    folder: Path

    def row(self, point: Point) -> Row:
        """A point's work, and its distances in pixels."""
        if point.policy is None:
            images, flops_ratio = self._uncached(point), STEPS / point.steps
            steps = {"full": point.steps}
        else:
            images, report = generate(self.setup, point, self.denoiser(point), self.seed)
            flops_ratio = report.flops_ratio * STEPS / point.steps
            steps = dict(Counter(record.kind for record in report.steps))
        references = (
            Point("", self.setup.own, STEPS),
            Point("", point.sampler, STEPS),
            Point("", *self.setup.converged),
        )
        own, same, converged = (measures.psnr(self._uncached(to), images) for to in references)
        return Row(
            point=point.text,
            policy=point.policy,
            grid=point.grid,
            steps=steps,
            flops_ratio=flops_ratio,
            psnr_own=own,
            psnr_same=same,
            psnr_converged=converged,
        )

    def frechet(self, point: Point, samples: int) -> float:
        """The distance of ``samples`` digits to the data; what was drawn before is kept.

        Other seeds follow that of the PSNRs, one per batch.
        """
        classifier, real = digits.load_classifier(), digits.load_images()[0]
        denoiser = self.denoiser(point)
        drawn: list[measures.Features] = []
        while len(drawn) * self.setup.shape[0] < samples:
            seed = self.seed + 1 + len(drawn)
            file = self._file("features", point, seed)
            if not file.exists():
                images, _ = generate(self.setup, point, denoiser, seed)
                _save(file, measures.features(classifier, images))
            drawn.append(np.load(file))
        found = np.concatenate(drawn)[:samples]
        return measures.frechet(measures.features(classifier, real), found)

    def denoiser(self, point: Point) -> Denoiser:
        """The model under the point's policy, or under its peer."""
        if point.peer is not None:
            return Cached(
                self.setup, point.peer, self.setup.samplers[point.sampler](point.timesteps)
            )
        if point.source is None:
            return self.setup.model
        torch._dynamo.reset()  # which takes eight backends of one model, and a point needs one
        return toca_fx.compile(self.setup.model, point.source, inner="eager")

    def _uncached(self, point: Point) -> Tensor:
        """The images of an uncached run, sampled once."""
        file = self._file("images", point, self.seed)
        if not file.exists():
            images, _ = generate(self.setup, point, self.setup.model, self.seed)
            _save(file, images.numpy())
        return torch.from_numpy(np.load(file))

    def _file(self, what: str, point: Point, seed: int) -> Path:
        of = (self.setup.name, self.setup.weights, self.setup.shape[0], point.digest, seed)
        return self.folder / what / f"{'-'.join(map(str, of))}.npy"


def generate(setup: Setup, point: Point, denoiser: Denoiser, seed: int) -> tuple[Tensor, Any]:
    """The images of a point, and the report of its policy or peer, None if it is uncached."""
    scheduler = setup.samplers[point.sampler](point.timesteps)
    if isinstance(denoiser, Cached):
        with denoiser.generation(scheduler) as work:
            return setup.sample(denoiser, scheduler, seed=seed), work
    known = toca_fx.session(timesteps=scheduler.timesteps) if point.policy else nullcontext()
    with known as run:
        images = setup.sample(denoiser, scheduler, seed=seed)
    return images, None if run is None else run.report()


def _save(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    with unfinished.open("wb") as stream:
        np.save(stream, values)
    unfinished.replace(file)
