"""s1 on a GPU, as an operator: column sums of the attention map from the log-sum-exp that a fused kernel returned. O(N) memory.

s1[b, h, j] = sum_i exp(scale q_i . k_j - logsumexp_i)
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor


def has_kernel(query: Tensor) -> bool:
    """Whether ``column_sums`` runs on such queries: on a GPU, where Triton is installed."""
    return query.device.type == "cuda" and importlib.util.find_spec("triton") is not None


@torch.library.custom_op("toca_fx::column_sums", mutates_args=())
def column_sums(query: Tensor, key: Tensor, logsumexp: Tensor, scale: float) -> Tensor:
    """Query [B, H, N, D], key [B, H, M, D], and the natural logsumexp [B, H, N] of scale q k^T -> [B, H, M] in float32."""
    from toca_fx.columns_triton import launch

    sums = torch.empty(key.shape[:3], dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        launch(query, key, logsumexp, sums, scale)
    return sums


@column_sums.register_fake
def _(query: Tensor, key: Tensor, logsumexp: Tensor, scale: float) -> Tensor:
    return torch.empty(key.shape[:3], dtype=torch.float32, device=query.device)
