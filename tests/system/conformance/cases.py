"""The four reference cases (trimmed by tools/trim_golden.py): the authors' code on small random
models, latents given at every step.

A case knows how to build and call its model, and what the authors' code did: outputs, full or
partial, K, chosen tokens. Its keys, such as ``layer_03.cross-attn``, are translated to the paths of
the model's modules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.stdit3 import STDiT3
from tests.system.conformance import authors

HERE = Path(__file__).parent
NOTHING = 255  # pads the lists of chosen tokens

Tensors = Mapping[str, Tensor]
Facts = Mapping[str, Any]
Call = tuple[tuple[Tensor, ...], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """What differs from case to case.

    ``letters`` gives, for a module's path, F (full) or P (partial) for each call; ``spellings`` the
    beginnings and ends of the authors' keys and of the module paths; ``absent`` the weights that
    the reference file may lack. ``load`` makes the authors' own model of weights and settings.
    """

    policy: str
    model: Callable[..., nn.Module]
    call: Callable[[Tensors, int], Call]
    letters: Callable[[Facts, str], str]
    spellings: Mapping[str, str]
    shared: bool = False
    load: Callable[[Tensors, Facts], nn.Module] | None = None
    absent: frozenset[str] = frozenset({"pos_embed.pos_embed"})


@dataclass(frozen=True)
class Case:
    """One case; everything is read when it is first asked for."""

    name: str
    kind: Kind

    @cached_property
    def facts(self) -> Facts:
        return json.loads((HERE / f"{self.name}.json").read_text(encoding="utf-8"))

    @cached_property
    def vectors(self) -> Tensors:
        # Mapped tensors can be unaligned, which changes last bits.
        return {
            name: tensor.clone()
            for name, tensor in load_file(HERE / f"{self.name}.safetensors").items()
        }

    @property
    def steps(self) -> int:
        return len(self.vectors["outputs"])

    @property
    def keys(self) -> tuple[str, ...]:
        """The modules whose chosen tokens are recorded."""
        return tuple(
            sorted(
                name.removeprefix("fresh.") for name in self.vectors if name.startswith("fresh.")
            )
        )

    def model(self) -> nn.Module:
        """The untouched model with the reference weights."""
        settings = self.facts["model"]["kwargs"]
        weights = {
            name.removeprefix("weights."): tensor
            for name, tensor in self.vectors.items()
            if name.startswith("weights.")
        }
        if self.kind.load is not None:
            return self.kind.load(weights, settings)
        weights |= {
            name.removeprefix("weights."): self.vectors[source]
            for name, source in self.facts["shared_weights"].items()
        }
        model = self.kind.model(**settings).eval().requires_grad_(False)
        left = model.load_state_dict(weights, strict=False)
        assert set(left.missing_keys) <= self.kind.absent
        assert not left.unexpected_keys
        return model

    def run(self, model: nn.Module, call: int, **extra: Any) -> Tensor:
        """The output of one call, those channels that the reference has."""
        args, kwargs = self.kind.call(self.vectors, call)
        output = model(*args, **kwargs, **extra)
        output = output if isinstance(output, Tensor) else output[0]
        return output[tuple(slice(size) for size in self.expected(call).shape)]

    def expected(self, call: int) -> Tensor:
        """The output of the authors' code."""
        return self.vectors["outputs"][call]

    def path(self, key: str) -> str:
        """The path of the module that the authors' ``key`` means."""
        block, _, module = key.partition(".")
        stack, _, layer = block.partition("_")
        return (
            f"{self.kind.spellings[stack]}.{int(layer)}{self.kind.spellings[f'{stack}.{module}']}"
        )

    def letters(self, path: str) -> str:
        """F or P for each call."""
        return self.kind.letters(self.facts, path)

    def count(self, key: str) -> list[int | None]:
        """K for each call; ``None`` where the module is full."""
        return self.facts["K"][key]

    @property
    def counts(self) -> dict[str, list[int | None]]:
        """K for each call, by the path of the module."""
        return {self.path(key): self.count(key) for key in self.facts["K"]}

    def fresh(self, key: str, call: int) -> list[list[int]]:
        """Per sample the tokens chosen in this call, in descending score."""
        rows = [
            [token for token in row if token != NOTHING]
            for row in self.vectors[f"fresh.{key}"][call].tolist()
        ]
        return rows * 2 if self.kind.shared else rows


def _dit(**kwargs: Any) -> nn.Module:
    model = DiTTransformer2DModel(**kwargs)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = (
            0  # diffusers says 1, the authors of DiT say 0
        )
    return model


def _dit_call(given: Tensors, call: int) -> Call:
    latents = given["inputs.hidden_states"][call]
    timestep = given["inputs.timestep"][call].expand(2)
    return (torch.cat([latents, latents]),), {
        "timestep": timestep,
        "class_labels": given["inputs.class_labels"],
        "return_dict": False,
    }


def _pixart_call(given: Tensors, call: int) -> Call:
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


def _opensora_call(given: Tensors, call: int) -> Call:
    x, timestep = given["inputs.x"][call], given["inputs.timestep"][call]
    video = {name: given[f"inputs.{name}"] for name in ("mask", "fps", "height", "width")}
    return (torch.cat([x, x]), torch.cat([timestep, timestep]), given["inputs.y"][:, None]), video


def _flux_call(given: Tensors, call: int) -> Call:
    names = ("encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "guidance")
    latents = given["inputs.hidden_states"][call]
    timestep = given["inputs.timestep"][call].expand(len(latents))
    return (latents,), {
        **{name: given[f"inputs.{name}"] for name in names},
        "timestep": timestep,
        "return_dict": False,
    }


def _by_layer(facts: Facts, path: str) -> str:
    return "".join(call[int(path.split(".")[1])] for call in facts["layers"])


def _by_module(facts: Facts, path: str) -> str:
    stack, _, module = path.split(".")[:3]
    stack = stack.removesuffix("_blocks")
    return facts["modules"][
        f"{stack[:4]}-attn" if module == "attn" else f"{stack}.{module.replace('_', '-')}"
    ]


def _by_call(facts: Facts, path: str) -> str:
    return facts["calls"]


_OPENSORA = {
    f"{stack}.{module}": f".{module.replace('-', '_')}"
    for stack in ("spatial", "temporal")
    for module in ("cross-attn", "mlp")
}

CASES = {
    "dit_ddim50": Kind(
        policy="reference/dit-xl-2-ddim50",
        model=_dit,
        call=_dit_call,
        letters=_by_layer,
        spellings={"layer": "transformer_blocks", "layer.mlp": ".ff"},
    ),
    "pixart_dpm20": Kind(
        policy="reference/pixart-alpha",
        model=PixArtTransformer2DModel,
        call=_pixart_call,
        letters=_by_layer,
        spellings={"layer": "transformer_blocks", "layer.mlp": ".ff", "layer.cross-attn": ".attn2"},
        shared=True,
    ),
    "opensora_rflow30": Kind(
        policy="reference/opensora",
        model=STDiT3,
        call=_opensora_call,
        letters=_by_module,
        spellings={"spatial": "spatial_blocks", "temporal": "temporal_blocks", **_OPENSORA},
        shared=True,
        absent=frozenset(),
    ),
    "flux_t4": Kind(
        policy="reference/flux-dev-n4",
        model=FluxTransformer2DModel,
        call=_flux_call,
        letters=_by_call,
        spellings={
            "double": "transformer_blocks",
            "double.img_mlp": ".ff",
            "double.txt_mlp": ".ff_context",
            "single": "single_transformer_blocks",
            "single.mlp": "",
        },
    ),
}


def _own(name: str, spellings: Mapping[str, str], **changes: Any) -> Kind:
    """A case on the authors' own model, with what differs."""
    return replace(CASES[name], spellings=spellings, **changes)


_BLOCKS = {"layer": "blocks", "layer.mlp": ".mlp"}

AUTHORS = {
    "dit_ddim50": _own("dit_ddim50", _BLOCKS, load=authors.dit, call=authors.dit_call),
    "pixart_dpm20": _own(
        "pixart_dpm20",
        {**_BLOCKS, "layer.cross-attn": ".cross_attn"},
        load=authors.pixart,
        call=authors.pixart_call,
    ),
    "opensora_rflow30": _own(
        "opensora_rflow30", CASES["opensora_rflow30"].spellings, load=authors.opensora
    ),
    "flux_t4": _own(
        "flux_t4",
        {
            "double": "double_blocks",
            "double.img_mlp": ".img_mlp",
            "double.txt_mlp": ".txt_mlp",
            "single": "single_blocks",
            "single.mlp": "",
        },
        load=authors.flux,
        call=authors.flux_call,
    ),
}
"""The same cases on the authors' own models (tests/authors.py)."""


@cache
def load_case(name: str, own: bool = False) -> Case:
    return Case(name, (AUTHORS if own else CASES)[name])
