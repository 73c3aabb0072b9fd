"""What runs a case: the uncached model, ours under several policies, and the caches that users would pick instead.

All share one set of weights. Each has a context of its own, so that the sessions of several do not meet.
"""

from __future__ import annotations

import contextvars
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, cast

import torch
from torch import nn

import toca_fx
from toca_fx.integrations.diffusers import prediction
from toca_fx.policy import Policy
from toca_fx.policy.types import Action, Ratio, Scores
from toca_fx.runtime import Session

Call = Mapping[str, Any]


class Contestant:
    """A way to run the model, timed step by step; ``generation`` opens what one sampling run needs."""

    def __init__(self, name: str, module: Callable[..., Any], generation: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.name, self._module, self._generation = name, module, generation
        self.run: Any = None
        self.compile_seconds = 0.0
        self._context = contextvars.copy_context()
        self._stack = ExitStack()

    def begin(self) -> None:
        """Open a generation."""
        self.run = self._context.run(self._stack.enter_context, self._generation())

    def end(self) -> None:
        """Close it."""
        self._context.run(self._stack.close)

    def seconds(self, call: Call) -> float:
        """Run one step; its wall time."""
        began = time.perf_counter()
        self._context.run(self._step, call)
        return time.perf_counter() - began

    def refusal(self, call: Call) -> str | None:
        """Why the model cannot be run in this way, if so: the first line of the error."""
        self.begin()
        try:
            self.seconds(call)
        except Exception as error:
            return str(error).strip().partition("\n")[0] or type(error).__name__
        finally:
            if isinstance(self.run, Session):
                self.run.close()  # after one step, on purpose
            self.end()
        return None

    def _step(self, call: Call) -> None:
        float(prediction(self._module(**call))[0].flatten()[0])  # waits for the device


@dataclass(frozen=True)
class Field:
    """The model, its calls, and the timesteps of them."""

    model: nn.Module
    calls: Sequence[Call]
    timesteps: Sequence[float]

    def uncached(self) -> Contestant:
        """``torch.compile(model)``."""
        return Contestant("torch.compile", cast(nn.Module, torch.compile(self.model, fullgraph=True)))

    def toca(self, name: str, policy: Policy) -> Contestant:
        """Ours under ``policy``."""
        return Contestant(name, toca_fx.compile(self.model, policy), self._session)

    def _session(self) -> AbstractContextManager[Session]:
        return toca_fx.session(timesteps=self.timesteps)

    def alternatives(self, policy: Policy) -> list[Contestant]:
        """What users could pick instead, as far as it is installed and takes this model."""
        interval = f"N = {policy.N.base}"
        found = [self.toca(f"FORA, {interval}", fora(policy)), *self._of_diffusers(), *self._of_cache_dit()]
        return [contestant for contestant in found if contestant is not None]

    def _of_diffusers(self) -> list[Contestant]:
        """First-block cache and pyramid attention broadcast, at the settings that their documentation shows."""
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
        scale = 1000 / max(self.timesteps)
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
            # Block by block, as diffusers recommends: hooks break the graph of the whole, and Dynamo would then give up on the
            # code of this model's class, ours included.
            _compile_blocks(twin)

            def step(twin: Any = twin, **call: Any) -> Any:
                now["timestep"] = float(call["timestep"].flatten()[0]) * scale
                return twin(**call)

            found.append(Contestant(name, step, lambda twin=twin: _fresh_hooks(twin)))  # type: ignore[misc]
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
        shared = {id(tensor): tensor for tensor in chain(self.model.parameters(), self.model.buffers())}
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
    """FORA: between full steps, at the same constant interval, everything is reused."""
    reused = tuple((kind, Action("reuse")) for kind, _ in policy.modules)
    interval = replace(policy.N, drift=0.0, windows=(), full_steps=None, extra_full_steps=(), phase="count")
    return replace(policy, name="fora", N=interval, R=Ratio(1.0), modules=reused, rules=())


def unscored(policy: Policy) -> Policy:
    """The same amount of work, chosen without a look at the attention: what scoring costs is the difference."""
    rules = tuple(
        replace(rule, overrides=tuple((key, value) for key, value in rule.overrides if not key.startswith("scores.")))
        for rule in policy.rules
    )
    return replace(policy, name="unscored", scores=Scores(staleness=1.0), spatial=None, rules=tuple(r for r in rules if r.overrides))
