"""The attention backends of diffusers, and stand-ins for the operators of libraries that need a
GPU: toca_fx knows them by their names.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models import attention_dispatch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    heads = (operand.transpose(1, 2) for operand in (q, k, v))
    mixed = F.scaled_dot_product_attention(*heads, scale=softmax_scale)
    return mixed.transpose(1, 2).contiguous(), q.new_zeros(q.shape[0], q.shape[2], q.shape[1])


@flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


@torch.library.custom_op("xformers::efficient_attention_forward_cutlass", mutates_args=())
def efficient(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> list[Tensor]:
    heads = (operand.transpose(1, 2) for operand in (query, key, value))
    return [F.scaled_dot_product_attention(*heads).transpose(1, 2).contiguous(), query.new_zeros(1)]


@efficient.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [query.new_empty(query.shape), query.new_empty(1)]


@torch.library.custom_op("sageattention::sageattn", mutates_args=())
def sage(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND") -> Tensor:
    heads = [
        operand.transpose(1, 2) if tensor_layout == "NHD" else operand for operand in (q, k, v)
    ]
    mixed = F.scaled_dot_product_attention(*heads)
    return (mixed.transpose(1, 2) if tensor_layout == "NHD" else mixed).contiguous()


@sage.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND") -> Tensor:
    return q.new_empty(q.shape)


# What diffusers imports of the libraries, made of the stand-ins.


def _flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, **_: Any
) -> Tensor:
    mixed, _lse = torch.ops.flash_attn._flash_attn_forward(
        q, k, v, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    )
    return mixed


def _memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, *_: Any, **__: Any
) -> Tensor:
    return torch.ops.xformers.efficient_attention_forward_cutlass(query, key, value, attn_bias)[0]


def _sageattn(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, **_: Any) -> Tensor:
    return torch.ops.sageattention.sageattn(q, k, v, tensor_layout)


_IMPORTED: dict[str, tuple[str, Any]] = {
    "flash": ("flash_attn_func", _flash_attn_func),
    "xformers": (
        "xops",
        SimpleNamespace(memory_efficient_attention=_memory_efficient_attention),
    ),
    "sage": ("sageattn", _sageattn),
}

BACKENDS = ("native", "_native_math", "flex", *_IMPORTED)


def attention(backend: str) -> Callable[[Any], None]:
    """As ``model.set_attention_backend(backend)``, which refuses what needs a GPU."""

    def choose(model: Any) -> None:
        if backend in _IMPORTED:
            setattr(attention_dispatch, *_IMPORTED[backend])
        chosen = attention_dispatch.AttentionBackendName(backend)
        for module in model.modules():
            if hasattr(getattr(module, "processor", None), "_attention_backend"):
                module.processor._attention_backend = chosen

    return choose
