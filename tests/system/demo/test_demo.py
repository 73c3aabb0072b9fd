"""The digits that ship: weights, quality, and the demo command from end to end."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

import toca_fx
from toca_fx.demo import digits, run
from toca_fx.policy import shipped_policies


def test_samples_show_the_class_that_was_asked_for() -> None:
    classes = torch.arange(10)
    samples = digits.sample(digits.load_denoiser(), classes, steps=8, seed=1)
    assert run.recognised(digits.load_classifier(), samples, classes) >= 0.9


@pytest.mark.slow(reason="the demo command compares the same two generations, in pixels")
def test_cached_samples_are_close_to_uncached_ones() -> None:
    classes = torch.arange(10)
    denoiser = digits.load_denoiser()
    fast = toca_fx.compile(denoiser, "digits", inner="eager")
    expected = digits.sample(denoiser, classes, steps=50).clamp(-1, 1)
    with toca_fx.session(num_steps=50) as session:
        actual = digits.sample(fast, classes, steps=50).clamp(-1, 1)
    assert session.report().flops_ratio > 1.5
    assert 20 < run.psnr(expected, actual) < 60


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A denoiser of 2 of its 12 blocks: digits are blurred, and compiled in a quarter of the time.

    (Uncached all blocks are one graph.)
    """
    whole = digits.load_denoiser()
    whole.transformer_blocks = whole.transformer_blocks[:2]
    monkeypatch.setattr(digits, "load_denoiser", lambda: whole)


@pytest.mark.usefixtures("shallow")
def test_demo_command_writes_a_picture_and_prints_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    picture, policy = tmp_path / "demo.png", tmp_path / "fewer.yaml"
    shipped = shipped_policies()["digits"].read_text(encoding="utf-8")
    assert "steps: 50" in shipped
    policy.write_text(shipped.replace("steps: 50", "steps: 12"), encoding="utf-8")
    arguments = argparse.Namespace(policy=policy, per_class=1, seed=0, output=str(picture))
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    for word in (
        "latency ratio",
        "FLOPs ratio",
        "PSNR",
        "recognised",
        "uncached, 12 steps",
        "digits, 12 steps",
    ):
        assert word in printed
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("toca_fx") and record.levelname != "INFO"
    ] == []
