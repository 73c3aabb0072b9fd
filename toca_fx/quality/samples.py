"""The user's runs as functions that can be repeated: a generation from the same noise each time."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from toca_fx.quality.stand_in import Answer, Sample, standing_in

Run: TypeAlias = Mapping[str, Any] | Callable[[Any], Any]
"""Keyword arguments for a pipeline; or a function of the model, or pipeline, that samples with it
and returns the final latents or images.
"""


def model_of(target: Any) -> nn.Module:
    """The model that is calibrated: ``target``, or a pipeline's transformer. Of a twin of
    ``toca_fx.compile`` it is what is uncached.

    Raises:
        TypeError: it is neither.
    """
    model = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
    if not isinstance(model, nn.Module):
        raise TypeError(
            "calibrate: expected a torch.nn.Module or a diffusers pipeline with a transformer, got "
            f"{type(target).__name__}"
        )
    found: nn.Module = getattr(model, "_toca_model", model)
    return found


def sample_of(target: Any, run: Run, name: str) -> Sample:
    """A run, called ``name`` in messages, that starts from the same noise whenever it is called.

    Generators among a pipeline's arguments are set back, and so is torch's own.

    Raises:
        TypeError: it is no run of ``target``.
    """
    is_module = isinstance(target, nn.Module)
    if isinstance(run, Mapping):
        if is_module:
            raise TypeError(
                f"{name} is a mapping, the keyword arguments of a pipeline, but the target is a "
                f"{type(target).__name__}: expected a function run(model) that samples with it"
            )
        start = _of_pipeline(run)
    elif callable(run):
        start = run
    else:
        raise TypeError(
            f"{name}: expected a function run(model), or keyword arguments for a pipeline, got "
            f"{type(run).__name__}"
        )

    def sample(answer: Answer) -> Tensor:
        stand_in: Any = standing_in(model_of(target), answer)
        if not is_module:
            pipeline = copy.copy(target)
            pipeline.transformer = stand_in
            stand_in = pipeline
        devices = range(torch.cuda.device_count())
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            return _final(name, start(stand_in))

    return sample


def _of_pipeline(arguments: Mapping[str, Any]) -> Callable[[Any], Any]:
    """The call of a pipeline, quietly, up to its latents where it can return them."""
    generators = [
        leaf for leaf in tree_leaves(dict(arguments)) if isinstance(leaf, torch.Generator)
    ]
    states = [generator.get_state() for generator in generators]

    def start(pipeline: Any) -> Any:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)
        takes = inspect.signature(pipeline.__call__).parameters
        latents = {"output_type": "latent"} if "output_type" in takes else {}
        return pipeline(**{**latents, **arguments})

    return start


def _final(name: str, result: Any) -> Tensor:
    """The final latents or images in what a run returned, on the host.

    Raises:
        TypeError: there are none.
    """
    found = result
    for attribute in ("images", "frames"):
        found = getattr(found, attribute, found)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if type(found).__module__ == "numpy":
        found = torch.as_tensor(found)
    if not isinstance(found, Tensor) or found.ndim == 0:
        raise TypeError(
            f"{name} returned a {type(found).__name__}: expected the final latents or images, as a "
            "tensor or as `images` (or `frames`) of an output; of a pipeline, output_type='latent'"
        )
    return found.detach().cpu()
