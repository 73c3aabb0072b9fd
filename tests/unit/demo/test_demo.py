"""What the demo ships: its weights, its classifier, its denoiser."""

from __future__ import annotations

import torch

from toca_fx.demo import digits, run


def test_weights_are_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in digits.WEIGHTS.glob("*.safetensors")) < 8 * 2**20


def test_classifier_knows_the_digits() -> None:
    images, labels = digits.load_images()
    assert run.recognised(digits.load_classifier(), images, labels) > 0.98


def test_a_batch_shows_each_digit_as_it_is_alone() -> None:
    denoiser = digits.load_denoiser()
    noise = torch.Generator().manual_seed(0)
    pair = torch.randn(2, 1, digits.SIZE, digits.SIZE, generator=noise)
    labels = torch.tensor([3, 7])
    with torch.no_grad():
        together = denoiser(
            pair, timestep=torch.tensor([500, 500]), class_labels=labels, return_dict=False
        )[0]
        alone = denoiser(
            pair[:1], timestep=torch.tensor([500]), class_labels=labels[:1], return_dict=False
        )[0]
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)
