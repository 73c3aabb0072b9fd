"""The contestants of a case: the uncached model, ours under several policies, and other caches.

All share one set of weights. Each has a context of its own, so that the sessions of several do not
meet.
"""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import nn

from toca_fx import backend
from toca_fx.plan.schedule import full_steps
from toca_fx.policy import Action, Forecast, Interval, Policy, Ratio, Scores
from toca_fx.runtime.context import Run, session

Call = Mapping[str, Any]


class Contestant:
    """A way to run the model.

    ``run`` is what ``open_run`` opened for its latest generation. ``compile_seconds`` are those of
    the first calls that compiled. After ``warm_ups`` generations all steps are as fast as they get.
    """

    def __init__(
        self,
        name: str,
        module: Callable[..., Any],
        open_run: Callable[[], AbstractContextManager[Any]] = nullcontext,
        warm_ups: int = 1,
    ) -> None:
        self.name, self._module, self._open_run, self.warm_ups = name, module, open_run, warm_ups
        self.run: Any = None
        self.compile_seconds = 0.0
        self._context = contextvars.copy_context()

    @contextmanager
    def generation(self) -> Iterator[None]:
        """The context of one sampling run; if it fails, no warning says that it was too short."""
        opened = ExitStack()
        self.run = self._context.run(opened.enter_context, self._open_run())
        try:
            yield
        except BaseException:
            if isinstance(self.run, Run):
                self.run.close()
            raise
        finally:
            self._context.run(opened.close)

    def step(self, call: Call) -> None:
        """Run one model call; does not wait for the device."""
        self._context.run(self._module, **call)


@dataclass(frozen=True)
class Field:
    """The model, its calls and their timesteps; ``mode`` is that of ``toca_fx.compile``."""

    model: nn.Module
    calls: Sequence[Call]
    timesteps: Sequence[float]
    mode: str | None = None

    def uncached(self) -> Contestant:
        """``torch.compile(model)``."""
        compiled = torch.compile(self.model, fullgraph=True)
        return Contestant("torch.compile", cast(nn.Module, compiled))

    def uncached_recorded(self) -> Contestant:
        """``torch.compile(model)`` with its calls recorded as CUDA graphs."""
        recorded = torch.compile(self.model, fullgraph=True, mode="reduce-overhead")
        return Contestant("torch.compile, CUDA graphs", cast(nn.Module, recorded))

    def toca(self, name: str, policy: Policy) -> Contestant:
        """Ours under ``policy``."""
        # On a GPU a step may be run, then recorded and only then replayed; a number of fresh tokens
        # may come once in a generation.
        warm_ups = 1 if next(self.model.parameters()).device.type == "cpu" else 3
        twin = backend.compile(self.model, policy, mode=self.mode)
        return Contestant(name, twin, self._session, warm_ups)

    def _session(self) -> AbstractContextManager[Run]:
        return session(timesteps=self.timesteps)

    def alternatives(self, policy: Policy) -> list[Contestant]:
        """Other caches, as far as they are installed and take this model."""
        reused = fora(policy)
        ours = self.toca(f"FORA, N = {reused.N.base}", reused)
        return [ours, *self._of_diffusers(), *self._of_cache_dit()]

    def _of_diffusers(self) -> list[Contestant]:
        """First-block cache and pyramid attention broadcast, as their documentation sets them."""
        if not hasattr(self.model, "enable_cache"):
            return []
        from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

        now = {"timestep": 0.0}
        broadcast = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            temporal_attention_block_skip_range=4,
            cross_attention_block_skip_range=6,
            spatial_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=lambda: now["timestep"],
        )
        # Not read from the call: a value on a GPU is waited for.
        scale = 1000 / max(self.timesteps)
        known = {
            id(call["timestep"]): timestep * scale
            for call, timestep in zip(self.calls, self.timesteps, strict=True)
        }
        found = []
        for name, config in (
            ("first-block cache, 0.05", FirstBlockCacheConfig(threshold=0.05)),
            ("pyramid attention broadcast", broadcast),
        ):
            twin = self._twin()
            try:
                twin.enable_cache(config)
            except (ValueError, NotImplementedError, AttributeError):
                continue  # it does not take this model
            # Block by block, as diffusers recommends: hooks break the graph of the whole, and
            # Dynamo would then give up on the code of this model's class, ours included.
            _compile_blocks(twin)

            def step(twin: Any = twin, **call: Any) -> Any:
                now["timestep"] = known[id(call["timestep"])]
                return twin(**call)

            found.append(Contestant(name, step, partial(_fresh_hooks, twin)))
        return found

    def _of_cache_dit(self) -> list[Contestant]:
        try:
            import cache_dit
        except ImportError:
            return []
        twin = self._twin()
        try:
            cache_dit.enable_cache(twin)
        except Exception:
            return []
        _compile_blocks(twin)
        return [Contestant("cache-dit, as it comes", twin)]

    def _twin(self) -> Any:
        """A copy with modules of its own and the same tensors."""
        shared = {
            id(tensor): tensor for tensor in chain(self.model.parameters(), self.model.buffers())
        }
        return copy.deepcopy(self.model, shared)


def _compile_blocks(model: nn.Module) -> None:
    for blocks in model.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile()


def _fresh_hooks(model: Any) -> AbstractContextManager[Any]:
    model._reset_stateful_cache()
    context: AbstractContextManager[Any] = model.cache_context("bench")
    return context


def fora(policy: Policy) -> Policy:
    """FORA: between full steps, at the same constant interval, everything is reused.

    Where full steps are listed, the interval is the one that leaves about as many.
    """
    reused = tuple((kind, Action("reuse")) for kind, _ in policy.modules)
    steps = range(policy.sampler.steps)
    listed = policy.N.full_steps is not None
    base = (
        round(len(steps) / len(full_steps(policy.N, steps, len(steps))))
        if listed
        else policy.N.base
    )
    interval = Interval(max(1, base), first=policy.N.first, last=policy.N.last)
    return replace(
        policy,
        name="fora",
        N=interval,
        R=Ratio(1.0),
        modules=reused,
        skip="none",
        gate=None,
        cache=replace(policy.cache, grain="module"),
        forecast=Forecast(),
        rules=(),
    )


def unscored(policy: Policy) -> Policy:
    """``policy`` without scores of attention: the difference in time is what scoring costs.

    The numbers of fresh tokens are the same.
    """
    rules = []
    for rule in policy.rules:
        kept = [(key, value) for key, value in rule.overrides if not key.startswith("scores.")]
        if kept:
            rules.append(replace(rule, overrides=tuple(kept)))
    scores = Scores(staleness=1.0)
    return replace(policy, name="unscored", scores=scores, spatial=None, rules=tuple(rules))
