"""The weights of LoRAs, and what is done to those of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = ("attn.to_q", "attn.to_out.0", "ff.net.2", "proj_mlp", "norm1.linear")
OF_WAN = ("attn1.to_q", "attn2.to_out.0", "ffn.net.2")

Operation = Callable[[Any], Mapping[str, Any] | None]
"""What is done to a pipeline; what it returns goes to the calls behind it."""


def lora(
    model: nn.Module, rank: int = 2, seed: int = 1, layers: Sequence[str] = LAYERS
) -> dict[str, Tensor]:
    """The weights of a LoRA, as a file of diffusers has them."""
    draw, weights = torch.Generator().manual_seed(seed), {}
    for path, module in model.named_modules():
        name = path.removesuffix(".base_layer")
        if isinstance(module, nn.Linear) and name.endswith(tuple(layers)):
            dtype = module.weight.dtype
            down = torch.randn(rank, module.in_features, generator=draw) / 2
            up = torch.randn(module.out_features, rank, generator=draw) / 2
            weights[f"transformer.{name}.lora_A.weight"] = down.to(dtype)
            weights[f"transformer.{name}.lora_B.weight"] = up.to(dtype)
    return weights


def load(name: str = "one", *, seed: int = 1, hotswap: bool = False) -> Operation:
    def operation(pipe: Any) -> None:
        options: dict[str, Any] = {"adapter_name": name, "hotswap": hotswap}
        pipe.load_lora_weights(_of(pipe.transformer, seed), **options)
        if _second(pipe):
            weights = _of(pipe.transformer_2, seed)
            pipe.load_lora_weights(weights, load_into_transformer_2=True, **options)

    return operation


def scaled(*scales: float, names: Sequence[str] = ("one", "two")) -> Operation:
    return lambda pipe: pipe.set_adapters(list(names[: len(scales)]), list(scales))


def scaled_in_the_call(scale: float) -> Operation:
    """By the argument of FLUX, or that of Wan."""

    def operation(pipe: Any) -> Mapping[str, Any]:
        name = "attention_kwargs" if _second(pipe) else "joint_attention_kwargs"
        return {name: {"scale": scale}}

    return operation


def delete(name: str) -> Operation:
    return lambda pipe: pipe.delete_adapters(name)


def disable(pipe: Any) -> None:
    pipe.disable_lora()


def enable(pipe: Any) -> None:
    pipe.enable_lora()


def fuse(pipe: Any) -> None:
    pipe.fuse_lora(components=_components(pipe), lora_scale=0.7)


def unfuse(pipe: Any) -> None:
    pipe.unfuse_lora(components=_components(pipe))


def unload(pipe: Any) -> None:
    pipe.unload_lora_weights()


def _of(model: nn.Module, seed: int) -> dict[str, Tensor]:
    return lora(model, seed=seed, layers=(*LAYERS, *OF_WAN))


def _second(pipe: Any) -> bool:
    return getattr(pipe, "transformer_2", None) is not None


def _components(pipe: Any) -> list[str]:
    return ["transformer", *["transformer_2"] * _second(pipe)]


SEQUENCES: dict[str, Sequence[Operation]] = {
    "loaded": [load()],
    "scaled": [load(), scaled(0.5), scaled(0.7)],
    "two of them": [load(), load("two", seed=2), scaled(0.3, 0.8)],
    "scaled in the call": [load(), scaled_in_the_call(0.5), scaled_in_the_call(0.7)],
    "disabled, enabled": [load(), disable, enable],
    "hot swapped": [load(), load(seed=2, hotswap=True)],
    "fused, unfused": [load(), fuse, unfuse],
    "deleted": [load(), load("two", seed=2), delete("one")],
    "unloaded, loaded": [load(), unload, load(seed=2)],
}
