"""The digits that ship with the package: data, denoiser, classifier, sampler.

The data are the 1797 UCI handwritten digits bundled with scikit-learn (8 x 8, 17 grey levels),
upsampled to 32 x 32 and scaled to [-1, 1]. The denoiser is the ordinary DiT of diffusers (256
tokens, 12 blocks, class-conditional with a null class) trained by ``tools/train_digits.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

SIZE = 32
NULL_CLASS = 10
WEIGHTS = Path(__file__).parent / "weights"


def load_images(size: int = SIZE) -> tuple[Tensor, Tensor]:
    """All digits as float32 [1797, 1, size, size] in [-1, 1], and their classes as int64 [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False)
    return images.clamp(-1, 1), torch.tensor(data.target, dtype=torch.int64)


def build_denoiser() -> nn.Module:
    """The demo's denoiser with random weights: the untouched diffusers class."""
    from toca_fx.examples.parts import dit

    return dit(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=12,
        sample_size=SIZE,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
        norm_eps=1e-6,
    )


def build_scheduler() -> Any:
    """DDIM over the linear schedule of the DiT paper, v-prediction, zero terminal SNR."""
    from toca_fx.examples.parts import ddim

    return ddim(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )


def build_solver() -> Any:
    """DPM-Solver++ (2M) for the same noise: what takes fewer steps than DDIM does."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler.from_config(build_scheduler().config)


def build_classifier() -> nn.Module:
    """A small convolutional network: [B, 1, 32, 32] -> logits [B, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def load_denoiser() -> nn.Module:
    """The trained denoiser in float32, in evaluation mode."""
    return _load(build_denoiser(), "digits-dit.safetensors")


def load_classifier() -> nn.Module:
    """The trained classifier in float32, in evaluation mode."""
    return _load(build_classifier(), "digits-classifier.safetensors")


def _load(model: Model, name: str) -> Model:
    from safetensors.torch import load_file

    # Clone: tensors of a memory-mapped file can be unaligned, which changes the last bits of a
    # matmul.
    state = {key: value.float().clone() for key, value in load_file(WEIGHTS / name).items()}
    model.load_state_dict(state)
    return model.eval()


def timesteps(steps: int) -> Tensor:
    """The timesteps [steps] at which ``sample`` calls the denoiser."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    found: Tensor = scheduler.timesteps
    return found


@torch.no_grad()
def sample(
    denoiser: Callable[..., tuple[Tensor, ...]],
    classes: Tensor,
    *,
    steps: int,
    seed: int = 0,
    guidance: float = 2.0,
    scheduler: Any = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Generate one digit per entry of ``classes``, [B] int64, with guidance.

    The ``scheduler`` is DDIM unless given. Guidance is classifier-free. Both guidance halves go
    through the denoiser as one batch of 2B rows, the conditional ones first. Returns images
    [B, 1, 32, 32], about [-1, 1]. The starting noise depends on ``seed`` alone.
    """
    scheduler = scheduler or build_scheduler()
    scheduler.set_timesteps(steps)
    noise = torch.randn(len(classes), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    labels = torch.cat([classes, torch.full_like(classes, NULL_CLASS)])
    images = noise
    for timestep in scheduler.timesteps:
        both = denoiser(
            torch.cat([images, images]),
            timestep=timestep.expand(len(labels)),
            class_labels=labels,
            return_dict=False,
        )[0]
        conditional, unconditional = both.chunk(2)
        predicted = unconditional + guidance * (conditional - unconditional)
        images = scheduler.step(predicted, timestep, images).prev_sample
        on_step()
    return images
