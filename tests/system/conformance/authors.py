"""The reference cases on the authors' own models: diffusers' weights under their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.authors import Flux, OpenSora, PixArt
from tests.models import OriginalDiT

Tensors = Mapping[str, Tensor]
Call = tuple[tuple[Tensor, ...], dict[str, Any]]
OPENSORA_FRAMES = 4
Rules = Sequence[tuple[str, str]]
"""Module paths of diffusers, as patterns, and those of the authors; several of one author's path
are concatenated in this order."""


def dit(weights: Tensors, settings: Mapping[str, Any]) -> nn.Module:
    depth = settings["num_layers"]
    return _loaded(OriginalDiT(depth=depth), _renamed(weights, _DIT), "pos_embed")


def pixart(weights: Tensors, settings: Mapping[str, Any]) -> nn.Module:
    heads = settings["num_attention_heads"]
    model = PixArt(
        input_size=settings["sample_size"],
        hidden_size=heads * settings["attention_head_dim"],
        depth=settings["num_layers"],
        num_heads=heads,
        caption_channels=settings["caption_channels"],
    )
    return _loaded(model, _renamed(weights, _PIXART), "y_embedder.y_embedding")


def opensora(weights: Tensors, settings: Mapping[str, Any]) -> nn.Module:
    model = OpenSora(**settings)
    _loaded(model, weights)
    # The first call ever writes a table, from a weight that no later call reads: it has a graph of
    # its own (tests/graph/capture/test_updates.py), and would be a generation of its own.
    model.rope(OPENSORA_FRAMES)
    return model


def flux(weights: Tensors, settings: Mapping[str, Any]) -> nn.Module:
    heads = settings["num_attention_heads"]
    model = Flux(
        in_channels=settings["in_channels"],
        hidden_size=heads * settings["attention_head_dim"],
        num_heads=heads,
        depth=settings["num_layers"],
        depth_single_blocks=settings["num_single_layers"],
        context_in_dim=settings["joint_attention_dim"],
        vec_in_dim=settings["pooled_projection_dim"],
        axes_dim=settings["axes_dims_rope"],
    )
    named = _renamed(weights, _FLUX)
    for end in ("weight", "bias"):  # diffusers has the scale in front of the shift
        name = f"final_layer.adaLN_modulation.1.{end}"
        named[name] = torch.cat(named[name].chunk(2)[::-1])
    return _loaded(model, named)


def dit_call(given: Tensors, call: int) -> Call:
    latents, timestep = given["inputs.hidden_states"][call], given["inputs.timestep"][call]
    labels = given["inputs.class_labels"]
    return (torch.cat([latents, latents]), timestep.expand(2), labels), {}


def pixart_call(given: Tensors, call: int) -> Call:
    latents, timestep = given["inputs.hidden_states"][call], given["inputs.timestep"][call]
    y, mask = given["inputs.encoder_hidden_states"], given["inputs.encoder_attention_mask"]
    return (torch.cat([latents, latents]), timestep.expand(2), y[:, None]), {"mask": mask}


def flux_call(given: Tensors, call: int) -> Call:
    img, timesteps = given["inputs.hidden_states"][call], given["inputs.timestep"][call]
    rows = len(img)
    return (), {
        "img": img,
        "img_ids": given["inputs.img_ids"].expand(rows, -1, -1),
        "txt": given["inputs.encoder_hidden_states"],
        "txt_ids": given["inputs.txt_ids"].expand(rows, -1, -1),
        "timesteps": timesteps.expand(rows),
        "y": given["inputs.pooled_projections"],
        "guidance": given["inputs.guidance"],
    }


def _loaded(model: nn.Module, weights: Tensors, absent: str = "") -> nn.Module:
    left = model.load_state_dict(dict(weights), strict=False)
    assert set(left.missing_keys) <= {absent}
    assert not left.unexpected_keys
    return model.eval().requires_grad_(False)


def _renamed(weights: Tensors, rules: Rules) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    left = set(weights)
    for old, new in rules:
        for name, tensor in weights.items():
            if at := re.fullmatch(old, name):
                found.setdefault(at.expand(new), []).append(tensor)
                left.discard(name)
    assert not left
    return {name: torch.cat(parts) if parts[1:] else parts[0] for name, parts in found.items()}


def _layers(old: str, new: str, *pairs: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Rules for the weights and biases of linear layers within the modules ``old`` and ``new``."""
    for inside, named in pairs:
        yield rf"{old}{inside}\.(?P<end>weight|bias)", rf"{new}{named}.\g<end>"


_BLOCK, _OWN = r"transformer_blocks\.(?P<layer>\d+)\.", r"blocks.\g<layer>."

_SELF_AND_MLP = (
    *((rf"attn1\.to_{part}", "attn.qkv") for part in "qkv"),
    (r"attn1\.to_out\.0", "attn.proj"),
    (r"ff\.net\.0\.proj", "mlp.fc1"),
    (r"ff\.net\.2", "mlp.fc2"),
)

_DIT: Rules = [
    *_layers("", "", (r"pos_embed\.proj", "x_embedder.proj")),
    *_layers(  # one for all blocks
        r"transformer_blocks\.0\.norm1\.emb\.",
        "",
        (r"timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"class_embedder\.embedding_table", "y_embedder.embedding_table"),
    ),
    *_layers(_BLOCK, _OWN, *_SELF_AND_MLP, (r"norm1\.linear", "adaLN_modulation.1")),
    *_layers("", "final_layer.", ("proj_out_1", "adaLN_modulation.1"), ("proj_out_2", "linear")),
]

_PIXART: Rules = [
    *_layers(
        "",
        "",
        (r"pos_embed\.proj", "x_embedder.proj"),
        (r"adaln_single\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"adaln_single\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"adaln_single\.linear", "t_block.1"),
        (r"caption_projection\.linear_1", "y_embedder.y_proj.fc1"),
        (r"caption_projection\.linear_2", "y_embedder.y_proj.fc2"),
        ("proj_out", "final_layer.linear"),
    ),
    *_layers(
        _BLOCK,
        _OWN,
        *_SELF_AND_MLP,
        (r"attn2\.to_q", "cross_attn.q_linear"),
        (r"attn2\.to_k", "cross_attn.kv_linear"),
        (r"attn2\.to_v", "cross_attn.kv_linear"),
        (r"attn2\.to_out\.0", "cross_attn.proj"),
    ),
    (rf"{_BLOCK}scale_shift_table", rf"{_OWN}scale_shift_table"),
    ("scale_shift_table", "final_layer.scale_shift_table"),
]

_DOUBLE, _SINGLE = r"double_blocks.\g<layer>.", r"single_blocks.\g<layer>."

_FLUX: Rules = [
    *_layers(
        "",
        "",
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        *(
            (rf"time_text_embed\.{old}_embedder\.linear_{at}", f"{new}_in.{layer}_layer")
            for old, new in (("timestep", "time"), ("guidance", "guidance"), ("text", "vector"))
            for at, layer in ((1, "in"), (2, "out"))
        ),
        (r"norm_out\.linear", "final_layer.adaLN_modulation.1"),
        ("proj_out", "final_layer.linear"),
    ),
    *_layers(
        _BLOCK,
        _DOUBLE,
        (r"norm1\.linear", "img_mod.lin"),
        (r"norm1_context\.linear", "txt_mod.lin"),
        *((rf"attn\.to_{part}", "img_attn.qkv") for part in "qkv"),
        *((rf"attn\.add_{part}_proj", "txt_attn.qkv") for part in "qkv"),
        (r"attn\.to_out\.0", "img_attn.proj"),
        (r"attn\.to_add_out", "txt_attn.proj"),
        *((rf"ff\.net\.{at}", f"img_mlp.{own}") for at, own in ((r"0\.proj", 0), (2, 2))),
        *((rf"ff_context\.net\.{at}", f"txt_mlp.{own}") for at, own in ((r"0\.proj", 0), (2, 2))),
    ),
    *_layers(
        f"single_{_BLOCK}",
        _SINGLE,
        (r"norm\.linear", "modulation.lin"),
        *((rf"attn\.to_{part}", "linear1") for part in "qkv"),
        ("proj_mlp", "linear1"),
        ("proj_out", "linear2"),
    ),
    *(
        (
            rf"{_BLOCK}attn\.norm_{old}{part[0]}\.weight",
            f"{_DOUBLE}{new}_attn.norm.{part}_norm.scale",
        )
        for old, new in (("", "img"), ("added_", "txt"))
        for part in ("query", "key")
    ),
    *(
        (rf"single_{_BLOCK}attn\.norm_{part[0]}\.weight", f"{_SINGLE}norm.{part}_norm.scale")
        for part in ("query", "key")
    ),
]
