"""The authors' rules as forward hooks on an untouched model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tests.system.conformance.cases import Case


class Maps(TorchFunctionMode):
    """Keeps the head-mean map [B, queries, keys] of the attention that ran last."""

    last: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            query, key, _, mask = (
                kwargs.get(name, args[at] if at < len(args) else None)
                for at, name in enumerate(names)
            )
            logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            if mask is not None:
                logits = (
                    logits.masked_fill(~mask, -math.inf)
                    if mask.dtype == torch.bool
                    else logits + mask
                )
            self.last = torch.softmax(logits, dim=-1).mean(1)
        return func(*args, **kwargs)


@dataclass
class Memory:
    """What one module keeps: its last output, and per token [B, N] how many calls ago it was
    computed.
    """

    path: str
    output: Any = None
    missed: Tensor = field(default_factory=lambda: torch.zeros(()))


class Replay:
    """One run of a case with ToCa on ``model``; ``chosen[path]`` are the tokens of the last call,
    [B, K] in order.

    ``halves`` of the batch share a selection by s2.
    """

    def __init__(self, case: Case | Tiny, model: nn.Module, halves: int = 2) -> None:
        self.case, self.call, self.maps, self.halves = case, 0, Maps(), halves
        self.counts = case.counts
        self.chosen: dict[str, Tensor] = {}
        INSTALL[case.name](self, model)

    def run(self, model: nn.Module, call: int) -> Tensor:
        self.call = call
        self.chosen.clear()
        with torch.no_grad(), self.maps:
            return self.case.run(model, call)

    def full(self, path: str) -> bool:
        return self.case.letters(path)[self.call] == "F"

    def hook(
        self, module: nn.Module, answer: Callable[..., Any], path: str, *arguments: Any
    ) -> None:
        """``module``'s output becomes answer(output, memory, *arguments)."""
        memory = Memory(path)
        module.register_forward_hook(
            lambda _module, _inputs, output: answer(output, memory, *arguments)
        )

    def reused(self, output: Any, memory: Memory) -> Any:
        """Attention: kept whole until the next full call."""
        if self.full(memory.path):
            memory.output = output
        return memory.output

    def partial(
        self,
        output: Tensor,
        memory: Memory,
        score: Callable[[], Tensor],
        after: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Modules with fresh tokens: ``after(score(), missed)`` is S [B, N]; ``score`` is only
        asked on partial calls.
        """
        if self.full(memory.path):
            memory.output, memory.missed = output, torch.zeros(output.shape[:2])
            return output
        count = self.counts[memory.path][self.call]
        ranked = torch.sort(
            after(score(), memory.missed), dim=1, descending=True, stable=True
        ).indices
        self.chosen[memory.path] = ranked[:, :count]
        fresh = torch.zeros_like(memory.missed, dtype=torch.bool).scatter(
            1, ranked[:, :count], True
        )
        memory.missed = (memory.missed + 1).masked_fill(fresh, 0)
        memory.output = torch.where(fresh[:, :, None], output, memory.output)
        return memory.output


def unit(score: Tensor) -> Tensor:
    return score / score.norm(dim=-1, keepdim=True)


def influence(attention: Tensor, tokens: slice = slice(None)) -> Tensor:
    """s1 [B, N] of the ``tokens`` among the keys of a map [B, Q, K]: all queries count, and the
    norm is taken of these tokens alone.
    """
    return unit(attention.mean(1)[:, tokens])


def entropy(attention: Tensor, halves: int) -> Tensor:
    """s2 [B, N] of a map [B, N, text], shared by the guidance halves: their maps lie side by side,
    each with half the weight.
    """
    both = torch.cat([half / halves for half in attention.chunk(halves)], dim=-1)
    disorder = -(both * (both + 1e-7).log()).sum(-1)
    return unit(1 + disorder).repeat(halves, 1)


def stale(interval: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda score, missed: score + 0.25 * missed / interval


def with_bonus(
    interval: int, bonus: float, side: int, cell: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """``stale``, then more for the best token of each cell of ``cell`` x ``cell`` tokens."""

    def after(score: Tensor, missed: Tensor) -> Tensor:
        score = stale(interval)(score, missed)
        across = side // cell
        cells = (
            score.reshape(-1, across, cell, across, cell)
            .transpose(2, 3)
            .reshape(len(score), across * across, cell * cell)
        )
        best = F.one_hot(cells.argmax(-1), cell * cell)
        cells = cells + cells * bonus * best
        return cells.reshape(-1, across, across, cell, cell).transpose(2, 3).reshape(score.shape)

    return after


def _dit(replay: Replay, model: nn.Module) -> None:
    """s1 of the block's attention, 2 x 2 cells; each row selects for itself."""
    after = with_bonus(3, 0.6, side=8, cell=2)
    for layer, block in enumerate(model.transformer_blocks):
        path, score = f"transformer_blocks.{layer}", Kept(replay, influence)
        replay.hook(block.attn1, score.of_full_calls, f"{path}.attn1")
        replay.hook(block.attn1, replay.reused, f"{path}.attn1")
        replay.hook(block.ff, replay.partial, f"{path}.ff", score, after)


def _pixart(replay: Replay, model: nn.Module) -> None:
    """s2 of the block's cross-attention, 4 x 4 cells. The MLP sees the map with the rows that this
    call renewed.
    """
    after = with_bonus(3, 0.4, side=8, cell=4)
    for layer, block in enumerate(model.transformer_blocks):
        path, score = (
            f"transformer_blocks.{layer}",
            Kept(replay, partial(entropy, halves=replay.halves)),
        )
        replay.hook(block.attn1, replay.reused, f"{path}.attn1")
        replay.hook(block.attn2, score.of_full_calls, f"{path}.attn2")
        replay.hook(block.attn2, replay.partial, f"{path}.attn2", score, after)
        replay.hook(block.attn2, score.of_fresh_tokens, f"{path}.attn2")
        replay.hook(block.ff, replay.partial, f"{path}.ff", score, after)


def _opensora(replay: Replay, model: nn.Module) -> None:
    """s2 of the block's own cross-attention, as of its last full call; staleness over the 3 of the
    MLP.
    """
    for stack in ("spatial_blocks", "temporal_blocks"):
        for layer, block in enumerate(getattr(model, stack)):
            path, score = f"{stack}.{layer}", Kept(replay, partial(entropy, halves=replay.halves))
            replay.hook(block.attn, replay.reused, f"{path}.attn")
            replay.hook(block.cross_attn, score.of_full_calls, f"{path}.cross_attn")
            replay.hook(block.cross_attn, replay.reused, f"{path}.cross_attn")
            replay.hook(block.mlp, replay.partial, f"{path}.mlp", score, stale(3))


def _flux(replay: Replay, model: nn.Module) -> None:
    """s1 of the joint map, text first; image and text apart in the double blocks, together in the
    single ones.
    """
    text = replay.case.vectors["inputs.encoder_hidden_states"].shape[1]
    for layer, block in enumerate(model.transformer_blocks):
        path = f"transformer_blocks.{layer}"
        for module, name, tokens in (
            (block.ff, "ff", slice(text, None)),
            (block.ff_context, "ff_context", slice(text)),
        ):
            score = Kept(replay, lambda attention, tokens=tokens: influence(attention, tokens))
            replay.hook(block.attn, score.of_full_calls, f"{path}.attn")
            replay.hook(module, replay.partial, f"{path}.{name}", score, stale(4))
        replay.hook(block.attn, replay.reused, f"{path}.attn")
    for layer, block in enumerate(model.single_transformer_blocks):
        path, score = f"single_transformer_blocks.{layer}", Kept(replay, influence)
        replay.hook(block.attn, score.of_full_calls, path)
        replay.hook(
            block.attn, replay.reused, path
        )  # before the projection, which attention and MLP share
        replay.hook(block.proj_out, replay.partial, path, score, stale(4))


class Kept:
    """A score that is a function of a map, and the map it is taken of."""

    def __init__(self, replay: Replay, function: Callable[[Tensor], Tensor]) -> None:
        self.replay, self.function = replay, function
        self.map = torch.zeros(())

    def __call__(self) -> Tensor:
        return self.function(self.map)

    def of_full_calls(self, output: Any, memory: Memory) -> Any:
        if self.replay.full(memory.path):
            self.map = self.replay.maps.last
        return output

    def of_fresh_tokens(self, output: Any, memory: Memory) -> Any:
        if memory.path in self.replay.chosen:
            rows = self.replay.chosen[memory.path][:, :, None].expand(-1, -1, self.map.shape[2])
            self.map = self.map.scatter(1, rows, self.replay.maps.last.gather(1, rows))
        return output


INSTALL = {
    "dit_ddim50": _dit,
    "pixart_dpm20": _pixart,
    "opensora_rflow30": _opensora,
    "flux_t4": _flux,
}


@dataclass(frozen=True)
class Tiny:
    """A generation without reference vectors: F or P and K for each call by the ends of the
    modules' paths, and each call's keywords.
    """

    name: str
    full: Mapping[str, str]
    counts: Mapping[str, list[int]]
    calls: Sequence[dict[str, Any]]

    def letters(self, path: str) -> str:
        return next(letters for end, letters in self.full.items() if path.endswith(end))

    def run(self, model: nn.Module, call: int) -> Tensor:
        output = model(**self.calls[call])
        return output if isinstance(output, Tensor) else output.sample
