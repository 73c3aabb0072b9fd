"""Fresh tokens beside a forecast, in ways that no policy has: is any worth its work?

    python -m tools.frontier.tried_tokens digits
    python -m tools.frontier.tried_tokens emoji --weights FOLDER

Between the full steps of `digits` and `flux-dev`, modules or the model's hidden state are forecast,
and a tenth of the tokens is computed: MLPs and cross-attention of tokens in the modules' grain, all
blocks against remembered keys and values in the model's. What its work would buy as full steps is
what the other tables of docs/quality.md say. PSNRs are to the uncached 50 steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toca_fx.policy import load_policy
from tools.frontier import measures
from tools.frontier.setups import STEPS, Setup, digits_setup, emoji_setup

RESULTS = Path(__file__).resolve().parents[1] / "results"
POLICIES = {"digits": "digits", "emoji": "flux-dev"}
CLUSTERS = 16


@dataclass(frozen=True)
class Scheme:
    """What is computed between full steps.

    ``share`` of the tokens is computed, chosen by ``pick``: at random, where the last forecast was
    worst, or one at random of each cluster of the tokens' last hidden states (K-means).
    ``keep``: a fresh token is forgotten, overwrites the newest value of its history as if it had
    been there at the full step (`overwrite`), or with its own time (`renew`), or is one more value
    of its token's history (`append`).
    ``spread``: the others of its cluster move this share of the way to the fresh one's value
    (ClusCa), or take over the error of its forecast as far as both moved alike (`error`, after
    ResCa).
    """

    grain: Literal["module", "model"]
    share: float = 0.0
    pick: Literal["random", "surprise", "cluster"] = "random"
    keep: Literal["nothing", "overwrite", "renew", "append"] = "nothing"
    spread: float | Literal["error"] = 0.0

    def __str__(self) -> str:
        if not self.share:
            return f"{self.grain}s forecast, no tokens"
        spread = f", spread {self.spread}" if self.spread else ""
        return f"{self.grain}s forecast, {self.share:.0%} {self.pick}, {self.keep}{spread}"


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

    def surprise(self, value: Tensor, at: int) -> Tensor:
        """The error of the forecast of ``value`` [B, N, D] by token, [B, N]."""
        return (value - self.forecast(at)).norm(dim=-1)


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
        elif self._is_full and self._scheme.pick == "cluster":
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
        history = self._histories.setdefault(unit, History(self._order))
        if self._is_full:
            value: Tensor = forward(given, *args, **kwargs)
            if history.values:
                self._surprise[unit] = history.surprise(value, self._step)
            history.add(value, self._step)
            return value
        found = history.forecast(self._step)
        if not tokens or not self._scheme.share:
            return found
        rows = self._choose(unit, given)
        fresh = forward(given.gather(1, _wide(rows, given)), *args, **kwargs)
        return self._renewed(history, found, rows, fresh)

    def _renewed(self, history: History, found: Tensor, rows: Tensor, fresh: Tensor) -> Tensor:
        """``found`` with what is fresh, which the history keeps as the scheme says."""
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
        history = self._histories.setdefault(block, History(self._order))
        if self._is_full:
            value: Tensor = forward(hidden_states, *args, **kwargs)
            if history.values:
                self._surprise[block] = history.surprise(value, self._step)
            history.add(value, self._step)
            if self._scheme.pick == "cluster":
                self._cluster(value)
            return value
        found = history.forecast(self._step)
        if not self._scheme.share:
            return found
        fresh = forward(hidden_states, *args, **kwargs)
        return self._renewed(history, found, self._rows, fresh)

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
    for keep in ("nothing", "overwrite", "renew", "append"):
        for pick in ("random", "surprise"):
            found.append(Scheme("module", 0.1, pick, keep))
    found.append(Scheme("module", 0.3, "surprise", "nothing"))
    found.append(Scheme("module", 0.3, "surprise", "append"))
    for spread in (0.0, 0.005, 0.1, "error"):
        found.append(Scheme("module", CLUSTERS / 256, "cluster", "overwrite", spread))
    found.append(Scheme("module", CLUSTERS / 256, "cluster", "nothing", "error"))
    for pick in ("random", "surprise"):
        for keep in ("nothing", "append"):
            found.append(Scheme("model", 0.1, pick, keep))
    found.append(Scheme("model", 0.3, "surprise", "nothing"))
    found.append(Scheme("model", CLUSTERS / 256, "cluster", "nothing", "error"))
    return found


def work(setup: Setup, full: int, scheme: Scheme) -> float:
    """FLOPs of the 50 steps, as a share of the uncached ones.

    Counted by linear layers, of which these models' blocks have 12 parts for each token (attention
    4, MLP 8) and 4 more with cross-attention (2 of them for text, left out); the rest is small.
    """
    crosses = setup.model.transformer_blocks[0].attn2 is not None  # type: ignore[index, union-attr]
    parts = 12 + 2 * crosses
    done = parts if scheme.grain == "model" else parts - 4
    return (full + (STEPS - full) * scheme.share * done / parts) / STEPS


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all schemes, and keep what was found."""
    parser = argparse.ArgumentParser(prog="python -m tools.frontier.tried_tokens")
    parser.add_argument("model", choices=POLICIES)
    parser.add_argument("--weights", type=Path, help="the folder of the emoji model's weights")
    parser.add_argument("--samples", type=int)
    arguments = parser.parse_args(argv)
    if arguments.model == "digits":
        setup = digits_setup(arguments.samples or 40)
    elif arguments.weights is None:
        parser.error("emoji: --weights is needed, the folder of the model's weights")
    else:
        setup = emoji_setup(arguments.samples or 16, arguments.weights)
    policy = load_policy(POLICIES[arguments.model])
    full = [int(at) for at in policy.N.full_steps.at]  # type: ignore[union-attr]
    expected = setup.sample(setup.model, setup.samplers[setup.own](STEPS), seed=0)
    rows: list[dict[str, Any]] = []
    for scheme in (Scheme("module"), Scheme("model", 0.1)):  # all steps full: the model itself
        denoiser = Tokens(setup.model, range(STEPS), policy.forecast.order, scheme)
        images = setup.sample(denoiser, setup.samplers[setup.own](STEPS), seed=0)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)
    for scheme in schemes():
        denoiser = Tokens(setup.model, full, policy.forecast.order, scheme)
        images = setup.sample(denoiser, setup.samplers[setup.own](STEPS), seed=0)
        row = {"scheme": str(scheme), "work": work(setup, len(full), scheme)}
        rows.append({**row, "psnr": measures.psnr(expected, images)})
        print(f"{rows[-1]['scheme']:60} {1 / row['work']:.2f}x {rows[-1]['psnr']:.1f}", flush=True)
    says = {"weights": setup.weights, "samples": setup.shape[0], "full": full, "rows": rows}
    file = RESULTS / f"frontier-{arguments.model}-tried-tokens.json"
    file.write_text(json.dumps(says, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
