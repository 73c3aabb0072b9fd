"""Caches around the digits' model: how each is set, put there and told where a generation is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import CacheMixin, DiTTransformer2DModel
from torch import Tensor, nn

Settings: TypeAlias = Mapping[str, Any]
Configure: TypeAlias = Callable[[Settings, int], Any]


@dataclass(frozen=True)
class At:
    """Where a generation is: the step of so many, and the noise's share of the latents."""

    step: int
    steps: int
    noise: float


@dataclass(frozen=True)
class Caching:
    """A model with a cache in it, and how that is told where a generation is."""

    model: nn.Module
    begin: Callable[[int], object]
    call: Callable[[At], AbstractContextManager[object]] = nullcontext


class Cacheable(DiTTransformer2DModel, CacheMixin):  # type: ignore[misc]
    """The class of the digits' model with diffusers' own methods for caches, which it lacks."""


def _twin(model: nn.Module, kind: Any) -> Any:
    """A model of class ``kind`` with modules of its own and the same tensors."""
    twin = kind.from_config(model.config).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin


def of_diffusers(model: nn.Module, config: Any) -> Caching:
    """One of diffusers' caches, around a twin of the model."""
    twin = _twin(model, Cacheable)
    twin.enable_cache(config)

    def call(at: At) -> AbstractContextManager[object]:
        # Both guidance branches are one batch: one name for both.
        context: AbstractContextManager[object] = twin.cache_context(
            "both", step_index=at.step, num_inference_steps=at.steps, sigma=at.noise
        )
        return context

    return Caching(twin, lambda _: twin._reset_stateful_cache(), call)


def of_cache_dit(model: nn.Module, configs: Any) -> Caching:
    """cache-dit with a calibrator or without, around a twin of the model."""
    import cache_dit

    cache_config, calibrator_config = configs
    twin = _twin(model, DiTTransformer2DModel)
    cache_dit.enable_cache(twin, cache_config=cache_config, calibrator_config=calibrator_config)
    return Caching(twin, lambda steps: cache_dit.refresh_context(twin, num_inference_steps=steps))


def _images(_model: nn.Module, args: tuple[Any, ...], _kwargs: Settings) -> list[Tensor]:
    """The images [B, C, H, W] that the model is called with, as SeaCache takes them: [BC, 1, H, W].

    Its filter is over the last three axes, and its distance over all.
    """
    return [args[0].flatten(0, 1)[:, None]]


def _config(kind: str, usual: Settings, settings: Settings, _steps: int) -> Any:
    return getattr(diffusers, kind)(**{**usual, **settings})


def _mag_config(settings: Settings, steps: int) -> Any:
    return diffusers.MagCacheConfig(calibrate=True, num_inference_steps=steps, **settings)


def _cache_dit_configs(calibrator: str | None, settings: Settings, steps: int) -> Any:
    """The cache's and its calibrator's; ``mask_policy`` is that of cache-dit's ``steps_mask``."""
    import cache_dit

    known = {each.name for each in dataclasses.fields(cache_dit.DBCacheConfig)}
    of_cache = {key: value for key, value in settings.items() if key in known}
    rest = {key: value for key, value in settings.items() if key not in known}
    if "mask_policy" in rest:
        of_cache["steps_computation_mask"] = cache_dit.steps_mask(
            total_steps=steps, mask_policy=rest.pop("mask_policy")
        )
    config = cache_dit.DBCacheConfig(num_inference_steps=steps, **of_cache)
    if calibrator is None and rest:
        raise TypeError(f"DBCacheConfig has no {', '.join(rest)}")
    return config, getattr(cache_dit, calibrator)(**rest) if calibrator else None


PACKAGES: Mapping[str, Callable[[nn.Module, Any], Caching]] = {
    "diffusers": of_diffusers,
    "cache-dit": of_cache_dit,
}

# TaylorSeer's own patterns match no module of this class, whose are named ``attn1`` and
# ``proj_out_2``: these say the same of it. Its factors are in float32 as in its example, not in
# bfloat16. FasterCache splits the batch of both guidance branches but not its class labels.
_MODULES = {
    "cache_identifiers": [r"transformer_blocks\.\d+\.(attn1|ff)"],
    "taylor_factors_dtype": torch.float32,
}
_LITE = {
    "cache_identifiers": ["proj_out_2"],
    "skip_predict_identifiers": [r"transformer_blocks\.\d+"],
    "taylor_factors_dtype": torch.float32,
}

PEERS: Mapping[str, Configure] = {
    "diffusers/taylorseer": partial(_config, "TaylorSeerCacheConfig", _MODULES),
    "diffusers/taylorseer-lite": partial(_config, "TaylorSeerCacheConfig", _LITE),
    "diffusers/first-block": partial(_config, "FirstBlockCacheConfig", {}),
    "diffusers/sea": partial(_config, "SeaCacheConfig", {"raw_vision_callback": _images}),
    "diffusers/mag": _mag_config,
    "cache-dit/dbcache": partial(_cache_dit_configs, None),
    "cache-dit/taylorseer": partial(_cache_dit_configs, "TaylorSeerCalibratorConfig"),
    "cache-dit/dmd": partial(_cache_dit_configs, "DMDCalibratorConfig"),
    "cache-dit/foca": partial(_cache_dit_configs, "FoCaCalibratorConfig"),
}
