"""Calibration from end to end: tiny models, a pipeline of diffusers, the digits, the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from torch import Tensor, nn

import toca_fx
from tests.models import tiny_dit
from toca_fx.cli import main
from toca_fx.demo import digits
from toca_fx.policy import Forecast, Placement, Policy, load_policy
from toca_fx.quality.forecasting import Forecasting

STEPS = 12


def euler(seed: int, steps: int = STEPS) -> Callable[[nn.Module], Tensor]:
    """A run of a tiny DiT without guidance; its variance is not used."""

    def run(model: nn.Module) -> Tensor:
        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        for step in range(steps):
            time = torch.full((2,), 1000 * (1 - step / steps))
            output = model(x, timestep=time, class_labels=torch.tensor([1, 2])).sample
            x = x - output[:, :4] / steps
        return x

    return run


def placed(policy: Policy) -> tuple[int, ...]:
    assert isinstance(policy.N.full_steps, Placement)
    return policy.N.full_steps.at


def to_calibrate() -> tuple[nn.Module, list[Callable[[nn.Module], Tensor]]]:
    """For the command."""
    return tiny_dit(), [euler(0), euler(1)]


def test_a_policy_that_compile_follows(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_dit()
    policy = toca_fx.calibrate(model, [euler(0), euler(1), euler(2)], full=5, budget=4)
    assert "single run" not in caplog.text
    full = placed(policy)
    assert (len(full), full[0], policy.sampler.steps) == (5, 0, STEPS)
    assert (policy.model, policy.cache.grain) == (("DiTTransformer2DModel",), "output")
    assert (policy.forecast.basis, policy.guidance.layout) == ("newton", "none")
    assert "5 of 12 steps, placed by toca_fx.calibrate" in policy.description
    assert "measured on 2 other runs" in policy.description
    fast = toca_fx.compile(model, policy, inner="eager")
    with torch.no_grad(), toca_fx.session(num_steps=STEPS) as session:
        found = euler(3)(fast)
    with torch.no_grad():
        expected = euler(3)(Forecasting(model, policy.forecast, full, 1))  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    kinds = ["full" if step in full else "skip" for step in range(STEPS)]
    assert [step.kind for step in session.report().steps] == kinds


def test_a_single_run_is_not_refined(caplog: pytest.LogCaptureFixture) -> None:
    policy = toca_fx.calibrate(tiny_dit(), [euler(0)], full=4, order=2)
    assert "calibrate: of a single run nothing is left to refine by" in caplog.text
    assert policy.forecast == Forecast(basis="newton", order=2)
    assert "measured" not in policy.description


def test_a_policy_to_start_from() -> None:
    given = {
        "version": 1,
        "name": "mine",
        "description": "Mine.",
        "sampler": {"steps": 30, "order": "descending"},
        "N": {"base": 3, "last": 2},
        "cache": {"grain": "model", "dtype": "bfloat16"},
        "forecast": {"basis": "taylor", "order": 1, "history": 4},
        "hoisting": {"memory": 7},
    }
    policy = toca_fx.calibrate(tiny_dit(), [euler(0)], full=4, policy=given)
    plain = toca_fx.calibrate(tiny_dit(), [euler(0)], full=4, order=1)
    assert policy.description.startswith("Mine. 4 of 12 steps")
    assert policy.sampler.steps == STEPS
    assert placed(policy) == tuple(STEPS - 1 - step for step in reversed(placed(plain)))
    assert (policy.cache.grain, policy.cache.dtype) == ("model", "bfloat16")
    assert policy.forecast == Forecast(basis="taylor", order=1)
    assert (policy.N.last, policy.hoisting.memory, policy.name) == (0, 7, "mine")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"full": 13}, ValueError, "full=13: expected 1 to 12"),
        ({"runs": []}, ValueError, "at least one run"),
        ({"order": 3}, ValueError, "calibrate.order=3.: expected 0, 1 or 2"),
        ({"runs": [euler(0), euler(1, 9)]}, ValueError, "runs.1. calls the model 9 times, but"),
        ({"target": 7}, TypeError, "a diffusers pipeline with a transformer, got int"),
        (
            {"policy": {"forecast": {"basis": "chebyshev"}}},
            ValueError,
            "no steps can be placed for a forecast with `basis: chebyshev`",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    if "policy" in changes:
        own = {"version": 1, "name": "x", "sampler": {"steps": 12}, "N": {"base": 3}}
        changes = {"policy": {**own, **changes["policy"]}}
    arguments = {"target": tiny_dit(), "runs": [euler(0)], "full": 4, **changes}
    with pytest.raises(error, match=message):
        toca_fx.calibrate(**arguments)


def test_a_pipeline_of_diffusers() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, sample_size=16)
    transformer = tiny_dit(num_embeds_ada_norm=1000, num_layers=2)
    pipe = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
    runs = [
        {
            "class_labels": [3, 7],
            "guidance_scale": 2.0,
            "num_inference_steps": 8,
            "generator": torch.Generator().manual_seed(seed),
        }
        for seed in (0, 1)
    ]
    policy = toca_fx.calibrate(pipe, runs, full=4, budget=2)
    assert (policy.sampler.steps, policy.guidance.layout) == (8, "batched")
    assert len(placed(policy)) == 4
    assert pipe.transformer is transformer


def test_the_command_writes_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, file = f"{__file__}:to_calibrate", tmp_path / "mine.yaml"
    command = ["tune", target, "--place-only", "--full", "4", "--budget", "2"]
    assert main([*command, "--output", str(file)]) == 0
    policy = load_policy(file)
    assert len(placed(policy)) == 4
    assert capsys.readouterr().out == f"{policy.description}\nwrote {file}\n"
    assert main([*command]) == 0
    assert capsys.readouterr().out == file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("target", "status", "message"),
    [
        ("digits", 2, "unknown target `digits`: expected module:function"),
        (f"{__file__}:to_calibrat", 2, "did you mean `to_calibrate`?"),
        (f"{__file__}:tiny_dit", 2, "expected the function to return (model or pipeline, list"),
        (f"{__file__}:to_calibrate", 1, "full=99: expected 1 to 12"),
    ],
)
def test_the_command_says_what_is_wrong(
    target: str, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", target, "--place-only", "--full", "99"]) == status
    assert message in capsys.readouterr().err


@pytest.mark.slow(reason="a generation of digits and a half of it on each schedule")
def test_digits_on_placed_steps_are_better_than_on_even_ones() -> None:
    model, classes = digits.load_denoiser(), torch.arange(10)

    def run(denoiser: nn.Module, seed: int = 1) -> Tensor:
        return digits.sample(denoiser, classes, steps=50, seed=seed)

    policy = toca_fx.calibrate(model, [run], full=12, order=2)
    expected = run(model, seed=0)

    def error(full: tuple[int, ...]) -> float:
        found = run(Forecasting(model, policy.forecast, full, 1), seed=0)  # type: ignore[arg-type]
        return float((found - expected).square().mean())

    even = tuple(round(50 * place / 12) for place in range(12))
    assert error(placed(policy)) < error(even) / 3
