"""Forecasts on an untouched model, written to be read: forward hooks let every module run, and put
what its memory makes of earlier values in the place of what it computes. Nothing is saved by it;
nothing is shared with toca_fx but the policy data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from torch import Tensor, nn

from tests.reference_forecast import History, Moment
from tests.reference_schedules import full_steps
from toca_fx.policy import Policy


class Hooks:
    """One generation of ``model`` under ``policy``, which computes no token by itself.

    While they are ``installed``, calls of the model are those of the generation; ``now`` is set
    ahead of each.
    """

    def __init__(self, model: nn.Module, policy: Policy, total: int | None = None) -> None:
        self.model, self.policy = model, policy
        self.total = policy.sampler.steps if total is None else total
        order = list(range(self.total))
        if policy.sampler.order == "descending":
            order.reverse()
        full = full_steps(policy.N, order, self.total)
        self.full = [s in full for s in order]
        self.now = Moment(0, 0.0)

    @contextmanager
    def installed(self) -> Iterator[Hooks]:
        """Hooks on the modules, or in front of the output layers."""
        if self.policy.cache.grain == "model":
            handles = [self._in_front_of(self.model.norm_out)]
        else:
            assert self.policy.cache.grain == "module"
            handles = [self._behind(module) for module in _modules(self.model)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _in_front_of(self, module: nn.Module) -> Any:
        memory = History.of(self.policy, self.total)
        return module.register_forward_pre_hook(
            lambda _, inputs: (self._remembered(inputs[0], memory), *inputs[1:])
        )

    def _behind(self, module: nn.Module) -> Any:
        memories: list[History] = []  # one for each tensor of the output

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            tensors = [output] if isinstance(output, Tensor) else list(output)
            if not memories:
                memories.extend(History.of(self.policy, self.total) for _ in tensors)
            found = [self._remembered(*pair) for pair in zip(tensors, memories, strict=True)]
            return found[0] if isinstance(output, Tensor) else tuple(found)

        return module.register_forward_hook(after)

    def _remembered(self, computed: Tensor, memory: History) -> Tensor:
        if not self.full[self.now.call]:
            return memory.at(self.now)
        memory.add(self.now, computed)
        return computed


def _modules(model: nn.Module) -> Iterable[nn.Module]:
    """What is forecast: attentions and MLPs before their gates; a single block of FLUX as one."""
    for block in model.transformer_blocks:
        if isinstance(model, DiTTransformer2DModel):
            yield from (block.attn1, block.ff)
        else:
            yield from (block.attn, block.ff, block.ff_context)
    if isinstance(model, FluxTransformer2DModel):
        for block in model.single_transformer_blocks:
            yield block.proj_out
