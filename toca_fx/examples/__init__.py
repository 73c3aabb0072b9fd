"""Example models of diffusers, with random weights: nothing is downloaded.

Every transformer of diffusers that denoises latents with attention blocks has a tiny example,
``examples()`` by class name; a few are in real size, ``PRESETS``. ``build()`` makes a model and the
inputs of one call, ``vary()`` the inputs of a later step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from toca_fx.examples import flux, hunyuan, image, ltx, sound, video, wan
from toca_fx.examples.example import Draw, Example
from toca_fx.examples.presets import PRESETS, pixart_alpha_256

__all__ = [
    "PRESETS",
    "UNSUPPORTED",
    "Draw",
    "Example",
    "build",
    "examples",
    "pixart_alpha_256",
    "prediction",
    "vary",
]

_FAMILIES = (
    flux.EXAMPLES,
    hunyuan.EXAMPLES,
    image.EXAMPLES,
    ltx.EXAMPLES,
    sound.EXAMPLES,
    video.EXAMPLES,
    wan.EXAMPLES,
)

_QUERY_OR_KEY = re.compile(r"(^|[._])(q|k|qk|kv|qkv|query|key)([._]|$)")

UNSUPPORTED: Mapping[str, str] = {
    "DreamLiteTransformer2DModel": "a stage of a U-Net, not a denoiser by itself",
    "DualTransformer2DModel": "a stage of a U-Net, not a denoiser by itself",
    "MiniMaxMusic3RVQDepthDecoder": "autoregressive: predicts codes, without a timestep",
    "PriorTransformer": "denoises one embedding vector, a single token",
    "T5FilmDecoder": (
        "denoises spectrograms of a deprecated pipeline; its inputs are the encodings of two other "
        "models"
    ),
    "TransformerTemporalModel": "a stage of a U-Net, not a denoiser by itself",
    "WanAnimate2Transformer3DModel": (
        "a step reads a cache that another call fills, and compiles a FlexAttention mask on the way"
    ),
}
"""The transformer classes of diffusers without an example, and why."""


def examples() -> dict[str, Example]:
    """The tiny examples by class name, sorted; only of classes that the installed diffusers has."""
    found = {
        example.model: example
        for family in _FAMILIES
        for example in family
        if hasattr(diffusers, example.model)
    }
    return dict(sorted(found.items()))


def build(
    example: Example,
    *,
    batch: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of an example, and the keyword arguments of one call.

    The model has random weights, is in eval mode and without gradients. Floating-point inputs take
    ``dtype`` too. Below 32 bits, what diffusers keeps in float32 stays so. On the device "meta"
    there are no weights, and no memory is taken for them. On a GPU the weights are made in place,
    and differ from those on the CPU.
    """
    device = torch.device(device)
    # 12 billion parameters are 48 GB in float32 and take minutes to draw on a CPU, but 24 GB and
    # seconds where they are needed.
    in_place = device.type == "cuda"
    with device if in_place or device.type == "meta" else torch.device("cpu"):
        model = _construct(example, dtype if in_place else torch.get_default_dtype())
    if device.type != "meta":
        _randomize(model, seed)
    # Not model.to(): that of diffusers warns about the parameters that stay float32, which is seen
    # to below.
    nn.Module.to(model, device=device, dtype=dtype).eval().requires_grad_(False)
    if dtype.itemsize < 4:
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if kept.intersection(name.split(".")):
                tensor.data = tensor.data.float()

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return model, {
        **tree_map(move, example.inputs(Draw(batch or example.batch, seed))),
        "return_dict": False,
    }


def prediction(output: Any) -> list[Tensor]:
    """What a model called with ``return_dict=False`` predicts: one tensor, or one per sample.

    Other outputs of the model are left out.
    """
    return [
        value
        for value in tree_leaves(output[0] if isinstance(output, tuple) else output)
        if isinstance(value, Tensor)
    ]


def vary(
    example: Example, inputs: Mapping[str, Any], step: int, steps: int, seed: int = 0
) -> dict[str, Any]:
    """The inputs of step ``step`` of ``steps``: ``inputs`` with other latents and timesteps.

    Latents are random, and timesteps fall from those of ``inputs`` towards 0.
    """
    generator = torch.Generator().manual_seed(seed * steps + step)

    def redraw(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    def lower(value: Any) -> Any:
        return (value * (1 - step / steps)).to(value.dtype) if isinstance(value, Tensor) else value

    latents = {name: tree_map(redraw, inputs[name]) for name in example.latents}
    timesteps = {name: tree_map(lower, inputs[name]) for name in example.timesteps}
    return {**inputs, **latents, **timesteps}


def _construct(example: Example, dtype: torch.dtype) -> nn.Module:
    """The model as its class makes it, on the default device; ``dtype`` is the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: nn.Module = getattr(diffusers, example.model)(**example.config)
        return model
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> None:
    """Draw weights that leave nothing degenerate.

    No gates or outputs are zero, attention maps are far from uniform, hidden states of order 1.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    for name, parameter in model.named_parameters():
        # The default is for tables of shifts, scales and gates, learned queries and positions.
        mean, deviation = 0.0, 0.3
        if id(parameter) in embeddings:
            deviation = 1.0
        elif name.endswith("bias"):
            deviation = 0.2
        elif name.endswith(("weight", "gamma")):
            is_norm = parameter.ndim == 1
            mean, deviation = (1.0, 0.1) if is_norm else (0.0, parameter[0].numel() ** -0.5)
            if _QUERY_OR_KEY.search(name):
                mean, deviation = 1.5 * mean, 1.5 * deviation
        noise = torch.randn(parameter.shape, generator=generator, device=device)
        parameter.copy_(noise * deviation + mean)
