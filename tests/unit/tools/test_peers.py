"""Other caches in the tool of the curves: that they skip what the tool says they do."""

from __future__ import annotations

import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import Tensor

from tests.tiny_digits import tiny_digits
from tools.frontier import solvers
from tools.frontier.measure import Bench, generate
from tools.frontier.peers import Work, noise_shares
from tools.frontier.points import Point, parse
from tools.frontier.setups import Setup

SAMPLERS = solvers.of_digits()
STEPS, BLOCKS = 6, 4

# Which steps run all blocks, and how many blocks the others run.
SKIPS = {
    "diffusers/first-block:threshold=99": ([0], 1),
    "diffusers/taylorseer:cache_interval=2,disable_cache_before_step=1": ([0, 2, 4], 0),
    "diffusers/taylorseer-lite:cache_interval=2,disable_cache_before_step=1": ([0, 2, 4], 0),
    "diffusers/sea:threshold=99": ([0, 3, 5], 0),
    "diffusers/mag:threshold=99,retention_ratio=0": ([0, 4], 0),
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many feed-forward layers ran, in a list of one."""
    count, forward = [0], FeedForward.forward

    def counted(self: FeedForward, *args: object, **kwargs: object) -> Tensor:
        count[0] += 1
        found: Tensor = forward(self, *args, **kwargs)
        return found

    monkeypatch.setattr(FeedForward, "forward", counted)
    return count


def sampled(setup: Setup, text: str) -> tuple[Tensor, Work]:
    bench, point = Bench(setup, 0, Path()), parse(f"{text}+ddim:{STEPS}", SAMPLERS)
    return generate(setup, point, bench.denoiser(point), seed=0)


@pytest.mark.parametrize("text", SKIPS)
@pytest.mark.skipif(not hasattr(diffusers, "SeaCacheConfig"), reason="diffusers has fewer caches")
def test_the_steps_that_a_peer_skips_are_counted(text: str, ran: list[int]) -> None:
    full, rest = SKIPS[text]
    setup, point = tiny_digits(BLOCKS), parse(f"{text}+ddim:{STEPS}", SAMPLERS)
    denoiser = Bench(setup, 0, Path()).denoiser(point)
    ran[0] = 0  # MagCache has calibrated itself
    images, work = generate(setup, point, denoiser, seed=0)
    assert [at for at, step in enumerate(work.steps) if step.kind == "full"] == full
    assert ran[0] == len(full) * BLOCKS + (STEPS - len(full)) * rest
    assert 1 < work.flops_ratio < STEPS
    uncached = generate(setup, Point("", "ddim", STEPS), setup.model, seed=0)[0]
    assert not torch.equal(images, uncached)
    again, work_again = generate(setup, point, denoiser, seed=0)
    assert torch.equal(again, images)
    assert work_again == work


def test_a_peer_that_skips_nothing_is_the_model(ran: list[int]) -> None:
    setup = tiny_digits(BLOCKS)
    images, work = sampled(setup, "diffusers/first-block:threshold=-1")
    uncached = generate(setup, Point("", "ddim", STEPS), setup.model, seed=0)[0]
    assert torch.equal(images, uncached)
    assert work.flops_ratio == 1
    assert ran[0] == 2 * STEPS * BLOCKS


def test_a_peer_is_known_by_its_settings_and_its_version() -> None:
    texts = [f"diffusers/first-block{given}+ddim:50" for given in ("", ":threshold=0.1")]
    one, other = (parse(text, SAMPLERS) for text in texts)
    assert [one.text, other.text] == texts
    assert (one.sampler, one.steps, one.source) == ("ddim", 50, None)
    assert one.digest != other.digest
    says = {"peer": "diffusers/first-block", "version": diffusers.__version__}
    assert (one.policy, other.policy) == (says, {**says, "threshold": 0.1})


@pytest.mark.parametrize("text", ["first-block:0.1", "first-block:nope=1", "sea:threshold=-1"])
def test_settings_that_a_peer_has_not_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^diffusers/{text}: "):
        parse(f"diffusers/{text}+ddim:50", SAMPLERS)


def test_a_peer_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(ValueError, match=r"^cache-dit/dmd: .*; pip install --no-deps cache-dit=="):
        parse("cache-dit/dmd+ddim:50", SAMPLERS)


def test_noise_falls_from_all_to_nearly_none() -> None:
    shares = noise_shares(SAMPLERS["ddim"](50))
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] < 0.2
