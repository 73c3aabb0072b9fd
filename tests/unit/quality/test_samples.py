"""The user's runs, in all the ways in which they can be given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from toca_fx.quality.samples import Run, model_of, sample_of
from toca_fx.quality.stand_in import standing_in


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Pipeline:
    """Like a diffusers pipeline, as far as it matters."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.quiet = transformer, False

    def set_progress_bar_config(self, *, disable: bool) -> None:
        self.quiet = disable

    def __call__(
        self, scale: float, generator: torch.Generator | None = None, output_type: str = "pil"
    ) -> SimpleNamespace:
        assert self.quiet
        assert output_type == "latent"
        noise = torch.randn(1, 2, generator=generator)
        return SimpleNamespace(images=self.transformer(scale * noise))


def half(x: Tensor) -> Tensor:
    return x / 2


def test_a_stand_in_is_the_model_in_all_but_its_calls() -> None:
    model = Double()
    view = standing_in(model, half)
    one = torch.ones(1, 2)
    assert isinstance(view, Double)
    assert view.weight is model.weight
    assert torch.equal(view(one), half(one))
    assert torch.equal(model(one), 2 * one)
    view.eval()
    assert not model.training


def test_a_stand_in_for_what_torch_compile_wrapped() -> None:
    model = torch.compile(Double(), backend="eager")
    assert torch.equal(standing_in(model, half)(torch.ones(2)), torch.full((2,), 0.5))


def test_a_run_gets_the_stand_in_and_no_gradients() -> None:
    model, seen = Double(), []

    def run(given: nn.Module) -> Tensor:
        seen.append(given)
        return given(torch.ones(1, 2)) * given.weight

    final = sample_of(model, run, "runs[0]")(half)
    assert torch.equal(final, torch.ones(1, 2))
    assert not final.requires_grad
    assert isinstance(seen[0], Double)
    assert seen[0] is not model


def test_a_run_starts_from_the_same_noise_each_time() -> None:
    def run(model: nn.Module) -> Tensor:
        return model(torch.randn(1, 2))

    sample, state = sample_of(Double(), run, "runs[0]"), torch.get_rng_state()
    assert torch.equal(sample(half), sample(half))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pipeline_runs_quietly_up_to_its_latents() -> None:
    pipeline = Pipeline(Double())
    generator = torch.Generator().manual_seed(3)
    wanted = 5 * torch.randn(1, 2, generator=torch.Generator().manual_seed(3)) / 2
    sample = sample_of(pipeline, {"scale": 5.0, "generator": generator}, "runs[0]")
    assert torch.equal(sample(half), wanted)
    assert torch.equal(sample(half), wanted)
    assert isinstance(pipeline.transformer, Double)
    assert not pipeline.quiet


def test_a_function_may_run_the_pipeline() -> None:
    def run(pipeline: Any) -> Any:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(1.0, torch.Generator().manual_seed(0), output_type="latent")

    final = sample_of(Pipeline(Double()), run, "runs[0]")(torch.zeros_like)
    assert torch.equal(final, torch.zeros(1, 2))


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(1, 2),
        (torch.ones(1, 2), None),
        SimpleNamespace(frames=torch.ones(1, 2)),
        SimpleNamespace(images=np.ones((1, 2), dtype=np.float32)),
    ],
)
def test_what_a_run_may_return(given: object) -> None:
    final = sample_of(Double(), lambda model: given, "runs[0]")(half)
    assert torch.equal(final, torch.ones(1, 2))


def test_what_it_may_not() -> None:
    for given in (None, torch.tensor(1.0), SimpleNamespace(images=["picture"])):
        with pytest.raises(
            TypeError, match=r"runs\[1\] returned a \w+: expected the final latents"
        ):
            sample_of(Double(), lambda model, given=given: given, "runs[1]")(half)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"prompt": "a cat"}, "is a mapping, the keyword arguments of a pipeline, but the target"),
        (7, "expected a function run.model., or keyword arguments for a pipeline, got int"),
    ],
)
def test_what_is_no_run(run: Run, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sample_of(Double(), run, "runs[0]")


def test_what_is_no_target() -> None:
    with pytest.raises(TypeError, match="a diffusers pipeline with a transformer, got function"):
        model_of(half)
