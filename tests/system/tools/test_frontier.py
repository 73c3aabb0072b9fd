"""Points under a policy: as users run them, and measured against the uncached run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_digits import tiny_digits
from tools.frontier.measure import Bench
from tools.frontier.points import parse
from tools.frontier.setups import Setup
from tools.frontier.timing import time_runs

POLICY = """
version: 1
name: tiny
sampler: {steps: 50}
guidance: {layout: batched}
N: {base: INTERVAL}
R: {base: 0.5}
scores: {staleness: 1.0}
"""


@pytest.fixture(scope="module")
def setup() -> Setup:
    return tiny_digits()


def write(folder: Path, interval: int) -> Path:
    file = folder / f"every-{interval}.yaml"
    file.write_text(POLICY.replace("INTERVAL", str(interval)), encoding="utf-8")
    return file


def test_a_policy_is_measured_on_its_own_sampler(setup: Setup, tmp_path: Path) -> None:
    bench = Bench(setup, 0, tmp_path / "cache")
    full, partial_ = write(tmp_path, 1), write(tmp_path, 5)
    row = bench.row(parse(f"{full}+dpm++:50", setup.samplers))
    assert row.steps == {"full": 50}
    assert row.psnr_same is None or row.psnr_same > 100
    assert row.psnr_own is not None
    assert row.psnr_own < 80  # another sampler is another image
    row = bench.row(parse(f"{partial_}+ddim:25", setup.samplers))
    assert row.steps == {"full": 5, "partial": 20}
    assert row.flops_ratio > 2  # half the steps, of which most compute half of the tokens
    assert row.psnr_own is not None
    assert row.psnr_own == row.psnr_same


def test_runs_are_timed_against_the_first(setup: Setup, tmp_path: Path) -> None:
    texts = ("ddim:50", f"{write(tmp_path, 5)}+ddim:10", "ddim:5")
    bench = Bench(setup, 0, tmp_path / "cache")
    points = [parse(text, setup.samplers) for text in texts]
    found = time_runs(setup, [(point, bench.denoiser(point)) for point in points], rounds=3)
    (seconds, own), _, (few_seconds, few) = found
    assert own == 1
    assert few < 0.5
    assert few_seconds == pytest.approx(few * seconds)
