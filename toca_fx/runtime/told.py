"""What diffusers tells a model of its calls: the methods that a twin has of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from toca_fx.runtime.clock import Told
from toca_fx.runtime.context import told_branch


@contextmanager
def cache_context(twin: Any, name: str, **told: Any) -> Iterator[None]:
    """The calls inside are of the branch ``name``; step and number of steps count if both are told.

    Pipelines of diffusers wrap each model call in it. The model's own is entered too.
    """
    own = getattr(twin._toca_model, "cache_context", None)
    with ExitStack() as stack:
        stack.enter_context(told_branch(name, _numbers(**told)))
        if own is not None:
            stack.enter_context(own(name, **told))
        yield


def _numbers(step_index: Any = None, num_inference_steps: Any = None, **_: Any) -> Told | None:
    try:
        step, steps = step_index.__index__(), num_inference_steps.__index__()
    except (AttributeError, TypeError):
        return None
    return Told(steps, position=step) if 0 <= step < steps else None


def enable_cache(twin: Any, config: Any) -> None:
    """Refuse a second cache.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"diffusers' enable_cache({type(config).__name__}) and toca_fx would both leave out the "
        "model's work, and neither would know of the other; call disable_cache() first, or do not "
        "compile the model with toca_fx"
    )


def refuse_two_caches(model: Any) -> None:
    """Refuse a model that has a cache of diffusers already.

    Raises:
        ValueError: it has one.
    """
    if getattr(model, "is_cache_enabled", False) is True:
        enable_cache(model, model._cache_config)


METHODS = {"cache_context": cache_context, "enable_cache": enable_cache}
