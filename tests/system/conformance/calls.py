"""How each of the models is built and called with the recorded inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Call = tuple[tuple[Tensor, ...], dict[str, Any]]


def dit(**kwargs: Any) -> nn.Module:
    model = DiTTransformer2DModel(**kwargs)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = (
            0  # diffusers says 1, the authors of DiT say 0
        )
    return model


def dit_call(given: Tensors, call: int) -> Call:
    latents = given["inputs.hidden_states"][call]
    timestep = given["inputs.timestep"][call].expand(2)
    return (), {
        "hidden_states": torch.cat([latents, latents]),
        "timestep": timestep,
        "class_labels": given["inputs.class_labels"],
        "return_dict": False,
    }


def pixart_call(given: Tensors, call: int) -> Call:
    latents = given["inputs.hidden_states"][call]
    text = {
        name: given[f"inputs.{name}"]
        for name in ("encoder_hidden_states", "encoder_attention_mask")
    }
    size = {"resolution": None, "aspect_ratio": None}
    timestep = given["inputs.timestep"][call].expand(2)
    return (torch.cat([latents, latents]),), {
        **text,
        "timestep": timestep,
        "added_cond_kwargs": size,
        "return_dict": False,
    }


def opensora_call(given: Tensors, call: int) -> Call:
    x, timestep = given["inputs.x"][call], given["inputs.timestep"][call]
    video = {name: given[f"inputs.{name}"] for name in ("mask", "fps", "height", "width")}
    return (torch.cat([x, x]), torch.cat([timestep, timestep]), given["inputs.y"][:, None]), video


def flux_call(given: Tensors, call: int) -> Call:
    names = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "guidance")
    latents = given["inputs.hidden_states"][call]
    timestep = given["inputs.timestep"][call].expand(len(latents))
    return (), {
        **{name: given[f"inputs.{name}"] for name in names},
        "hidden_states": latents,
        "timestep": timestep,
        "return_dict": False,
    }
