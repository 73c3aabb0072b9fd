"""Fresh tokens beside a forecast, in ways that no policy has: is any worth its work?

    python -m tools.frontier.tried_tokens digits
    python -m tools.frontier.tried_tokens emoji --weights FOLDER

Between the full steps of `digits` and `flux-dev`, modules or the model's hidden state are forecast,
and a tenth of the tokens is computed: MLPs and cross-attention of tokens in the modules' grain, all
blocks against remembered keys and values in the model's. PSNRs are to the uncached 50 steps, and
work is what ``torch.utils.flop_counter`` counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from toca_fx.lower.flops import FORMULAS
from toca_fx.policy import load_policy
from tools.frontier import measures
from tools.frontier.setups import STEPS, Denoiser, Setup
from tools.frontier.tried import POLICIES, asked, keep, placed

CLUSTERS = 16


@dataclass(frozen=True)
class Scheme:
    """What is computed between full steps.

    ``share`` of the tokens is computed, chosen by ``pick``: at random, where the last forecast was
    worst, or one at random of each cluster of the tokens' last hidden states (K-means).
    ``keep``: a fresh token is forgotten, overwrites the newest value of its history as if it had
    been there at the full step (`overwrite`), or with its own time (`renew`), or is one more value
    of its token's history (`append`).
    ``spread``: the newest values of the others of its cluster move this share of the way to the
    fresh one (after ClusCa), or they take over the error of its forecast as far
    as both moved alike (`error`, after ResCa).
    """

    grain: Literal["module", "model"]
    share: float = 0.0
    pick: Literal["random", "surprise", "cluster"] = "random"
    keep: Literal["nothing", "overwrite", "renew", "append"] = "nothing"
    spread: float | Literal["error"] = 0.0

    def __str__(self) -> str:
        if not self.share:
            return f"grain {self.grain}, no tokens"
        spread = f", spread {self.spread}" if self.spread else ""
        return f"grain {self.grain}, {self.share:.0%} {self.pick}, {self.keep}{spread}"


class History:
    """The last values [B, N, D] of every token, the newest first, with a time of each token's."""

    def __init__(self, order: int) -> None:
        self.values: list[Tensor] = []
        self.times: list[Tensor] = []  # [B, N]
        self._length = order + 1

    def add(self, value: Tensor, at: int) -> None:
        """All tokens are new."""
        self.values = [value, *self.values][: self._length]
        self.times = [torch.full(value.shape[:2], float(at)), *self.times][: self._length]

    def renew(self, rows: Tensor, fresh: Tensor, at: int, keep: str) -> None:
        """Some tokens are new: ``rows`` [B, K], ``fresh`` [B, K, D]."""
        wide = rows[..., None].expand_as(fresh)
        if keep == "append":
            for newer, older in reversed(list(zip(self.values, self.values[1:], strict=False))):
                older.scatter_(1, wide, newer.gather(1, wide))
            for newer, older in reversed(list(zip(self.times, self.times[1:], strict=False))):
                older.scatter_(1, rows, newer.gather(1, rows))
        self.values[0].scatter_(1, wide, fresh)
        if keep in ("append", "renew"):
            self.times[0].scatter_(1, rows, float(at))

    def forecast(self, at: int) -> Tensor:
        """The polynomial through each token's values (Newton's, by Lagrange's weights)."""
        found = torch.zeros_like(self.values[0])
        for i, value in enumerate(self.values):
            weight = torch.ones_like(self.times[i])
            for j, time in enumerate(self.times):
                if i != j:
                    weight = weight * (at - time) / (self.times[i] - time)
            found += weight[..., None] * value
        return found


class Tokens:
    """The denoiser under a scheme."""

    def __init__(self, model: Any, full: Sequence[int], order: int, scheme: Scheme) -> None:
        self._model, self._full, self._scheme = model, frozenset(full), scheme
        self._histories: dict[nn.Module, History] = {}
        self._surprise: dict[nn.Module, Tensor] = {}
        self._kept: dict[nn.Module, list[Tensor]] = {}  # keys and values
        self._order, self._step = order, -1
        self._drawn = torch.Generator().manual_seed(0)
        self._rows = torch.empty(0)
        self._clusters = torch.empty(0)  # [B, N]
        self._centres = torch.empty(0)  # [B, clusters, D]

    def __call__(self, *inputs: Any, **options: Any) -> tuple[Tensor, ...]:
        """The model's outputs."""
        self._step += 1
        self._rows = torch.empty(0)
        with self._changed():
            outputs: tuple[Tensor, ...] = self._model(*inputs, **options)
        return outputs

    @property
    def _is_full(self) -> bool:
        return self._step in self._full

    @contextmanager
    def _changed(self) -> Iterator[None]:
        changed: list[nn.Module] = []

        def change(module: nn.Module, forward: Any) -> None:
            module.forward = partial(forward, module, module.forward)
            changed.append(module)

        blocks = list(self._model.transformer_blocks)
        for block in blocks:
            if self._scheme.grain == "module":
                change(block.attn1, partial(self._unit, tokens=False))
                change(block.ff, partial(self._unit, tokens=True))
                if block.attn2 is not None:
                    change(block.attn2, partial(self._unit, tokens=True))
            elif self._is_full or self._scheme.share:
                change(block.attn1, self._attend)
            elif block is not blocks[-1]:
                change(block, lambda _, __, hidden_states, *args, **kwargs: hidden_states)
        if self._scheme.grain == "model":
            change(blocks[0], self._enter)
            change(blocks[-1], self._leave)
        if self._is_full and self._scheme.pick == "cluster":
            change(blocks[-1], self._clustered)
        try:
            yield
        finally:
            for module in changed:
                module.__dict__.pop("forward", None)

    def _choose(self, unit: nn.Module, like: Tensor) -> Tensor:
        """The rows [B, K] that are computed of a unit; of random ones, the same in all units."""
        batch, tokens, _ = like.shape
        if self._scheme.pick == "surprise" and unit in self._surprise:
            return self._surprise[unit].topk(int(self._scheme.share * tokens)).indices
        if not self._rows.numel():
            drawn = torch.rand(batch, tokens, generator=self._drawn)
            if self._scheme.pick == "cluster":
                of = torch.stack([self._clusters == i for i in range(CLUSTERS)], 1)
                self._rows = torch.where(of, drawn[:, None], -1.0).argmax(-1)
            else:
                self._rows = drawn.topk(int(self._scheme.share * tokens)).indices
        return self._rows

    def _unit(
        self, unit: nn.Module, forward: Any, given: Tensor, *args: Any, tokens: bool, **kwargs: Any
    ) -> Tensor:
        if self._is_full:
            return self._remember(unit, forward(given, *args, **kwargs))
        if not tokens or not self._scheme.share:
            return self._histories[unit].forecast(self._step)
        rows = self._choose(unit, given)
        return self._merge(
            unit, rows, forward(given.gather(1, _wide(rows, given)), *args, **kwargs)
        )

    def _remember(self, unit: nn.Module, value: Tensor) -> Tensor:
        """The ``value`` of a full step, which is in the history from here on."""
        history = self._histories.setdefault(unit, History(self._order))
        if history.values:
            self._surprise[unit] = (value - history.forecast(self._step)).norm(dim=-1)
        history.add(value, self._step)
        return value

    def _merge(self, unit: nn.Module, rows: Tensor, fresh: Tensor) -> Tensor:
        """The forecast with what is fresh, which the history keeps as the scheme says."""
        history = self._histories[unit]
        found = history.forecast(self._step)
        wide = _wide(rows, found)
        if self._scheme.spread:
            own = self._clusters  # the cluster of each token; row i of `rows` is cluster i's
            if self._scheme.spread == "error":
                error = (fresh - found.gather(1, wide)).gather(1, _wide(own, found))
                moved = history.values[0] - history.values[min(1, len(history.values) - 1)]
                theirs = moved.gather(1, wide).gather(1, _wide(own, found))
                found = found + F.cosine_similarity(moved, theirs, -1).clamp(0)[..., None] * error
            else:
                theirs = fresh.gather(1, _wide(own, found))
                history.values[0].lerp_(theirs, float(self._scheme.spread))
        if self._scheme.keep != "nothing":
            history.renew(rows, fresh, self._step, self._scheme.keep)
        return found.scatter(1, wide, fresh)

    def _attend(
        self, unit: Any, _: Any, given: Tensor, encoder_hidden_states: None = None, **__: Any
    ) -> Tensor:
        """Self-attention; on partial steps of the fresh tokens, against what is remembered."""
        assert encoder_hidden_states is None
        new = [unit.to_k(given), unit.to_v(given)]
        if self._is_full:
            self._kept[unit] = new
        else:
            for kept, value in zip(self._kept[unit], new, strict=True):
                kept.scatter_(1, _wide(self._rows, kept), value)
        apart = [
            value.unflatten(-1, (unit.heads, -1)).transpose(1, 2)
            for value in (unit.to_q(given), *self._kept[unit])
        ]
        found = F.scaled_dot_product_attention(*apart).transpose(1, 2).flatten(-2)
        return unit.to_out[0](found)  # type: ignore[no-any-return]

    def _enter(
        self, block: nn.Module, forward: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self._is_full:
            return forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        if not self._scheme.share:
            return hidden_states
        last = self._model.transformer_blocks[-1]
        self._rows = self._choose(last, hidden_states)
        chosen = hidden_states.gather(1, _wide(self._rows, hidden_states))
        return forward(chosen, *args, **kwargs)  # type: ignore[no-any-return]

    def _leave(
        self, block: nn.Module, forward: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not self._is_full and not self._scheme.share:
            return self._histories[block].forecast(self._step)
        value = forward(hidden_states, *args, **kwargs)
        if self._is_full:
            return self._remember(block, value)
        return self._merge(block, self._rows, value)

    def _clustered(
        self, block: nn.Module, forward: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        value: Tensor = forward(hidden_states, *args, **kwargs)
        self._cluster(value)
        return value

    def _cluster(self, hidden: Tensor, rounds: int = 10) -> None:
        """K-means of the tokens of each row, from the centres of the full step before."""
        if not self._centres.numel():
            even = torch.linspace(0, hidden.shape[1] - 1, CLUSTERS).long()
            self._centres = hidden[:, even].clone()
        for _ in range(rounds):
            self._clusters = torch.cdist(hidden, self._centres).argmin(-1)
            of = F.one_hot(self._clusters, CLUSTERS).to(hidden).transpose(1, 2)
            count = of.sum(-1, keepdim=True)
            self._centres = torch.where(count > 0, of @ hidden / count.clamp(1), self._centres)


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """The rows [B, K] as an index into ``like`` [B, N, D] along tokens."""
    return rows[..., None].expand(-1, -1, like.shape[-1])


def schemes() -> list[Scheme]:
    """All that is tried."""
    found = [Scheme(grain) for grain in ("model", "module")]
    for kept in ("nothing", "overwrite", "renew", "append"):
        for pick in ("random", "surprise"):
            found.append(Scheme("module", 0.1, pick, kept))
    found.append(Scheme("module", 0.3, "surprise", "nothing"))
    found.append(Scheme("module", 0.3, "surprise", "append"))
    for spread in (0.0, 0.005, 0.1, "error"):
        found.append(Scheme("module", CLUSTERS / 256, "cluster", "overwrite", spread))
    found.append(Scheme("module", CLUSTERS / 256, "cluster", "nothing", "error"))
    for pick in ("random", "surprise"):
        for kept in ("nothing", "append"):
            found.append(Scheme("model", 0.1, pick, kept))
    found.append(Scheme("model", 0.3, "surprise", "nothing"))
    found.append(Scheme("model", CLUSTERS / 256, "cluster", "nothing", "error"))
    return found


def sampled(setup: Setup, denoiser: Denoiser) -> tuple[Tensor, int]:
    """The images of a run, and its FLOPs."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        images = setup.sample(denoiser, setup.samplers[setup.own](STEPS), seed=0)
    return images, counter.get_total_flops()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all schemes, and keep what was found."""
    setup = asked("python -m tools.frontier.tried_tokens", argv)
    policy = load_policy(POLICIES[setup.name][0])
    full, order = placed(policy), policy.forecast.order
    expected, uncached = sampled(setup, setup.model)
    rows: list[dict[str, Any]] = []
    for scheme in schemes():
        images, flops = sampled(setup, Tokens(setup.model, full, order, scheme))
        row = {"scheme": str(scheme), "flops_ratio": uncached / flops}
        rows.append({**row, "psnr": measures.psnr(expected, images)})
        print("{scheme:60} {flops_ratio:.2f}x {psnr:.1f}".format(**rows[-1]), flush=True)
    keep(setup, "tried-tokens", full=full, rows=rows)


if __name__ == "__main__":
    main()
