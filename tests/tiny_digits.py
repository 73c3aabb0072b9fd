"""A small setup of the tool of the curves: digits of 8 x 8, by a model with random weights."""

from __future__ import annotations

from functools import partial

import torch

from toca_fx.examples.parts import dit
from tools.frontier import solvers
from tools.frontier.setups import Setup, guided_digits


def tiny_digits(blocks: int = 1) -> Setup:
    """Two digits under guidance, in one batch; the model has as many ``blocks``."""
    torch.manual_seed(0)
    model = dit(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=blocks,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    )
    return Setup(
        name="digits",
        model=model.eval(),
        guided=partial(guided_digits, classes=torch.arange(2), guidance=2.0),
        shape=(2, 1, 8, 8),
        samplers=solvers.of_digits(),
        own="ddim",
        converged=("ddim", 100),
    )
