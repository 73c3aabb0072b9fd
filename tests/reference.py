"""ToCa, written to be read: plain PyTorch on the model's own submodules, nothing shared with toca_fx but the policy data.

Everything is computed for all tokens; on a partial step only the chosen tokens of it enter the cache. That is the
definition (method: Zou et al., ToCa, ICLR 2025, section 3); it saves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models import OriginalDiT
from toca_fx.policy.types import Interval, Policy, SitePolicy

Choice = Mapping[str, Sequence[Sequence[int]]]  # site path -> per sample the chosen tokens


class _DiffusersParts:
    """How to walk a DiTTransformer2DModel."""

    def __init__(self, model: DiTTransformer2DModel) -> None:
        self.model = model
        self.blocks = list(model.transformer_blocks)
        self.patch: int = model.config.patch_size

    def paths(self, layer: int) -> tuple[str, str]:
        return f"transformer_blocks.{layer}.attn1", f"transformer_blocks.{layer}.ff"

    def tokens(self, x: Tensor) -> Tensor:
        return self.model.pos_embed(x)

    def modulation(self, block: Any, t: Tensor, y: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        return block.norm1.linear(F.silu(block.norm1.emb(t, y, hidden_dtype=dtype))).chunk(6, dim=1)

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        return block.norm1.norm, block.norm3

    def qkv(self, block: Any, x: Tensor) -> list[Tensor]:
        linears = (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        return [linear(x).unflatten(2, (block.attn1.heads, -1)).transpose(1, 2) for linear in linears]

    def project(self, block: Any, heads: Tensor) -> Tensor:
        return block.attn1.to_out[0](heads)

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        return block.ff(x)

    def output(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        model = self.model
        condition = model.transformer_blocks[0].norm1.emb(t, y, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(F.silu(condition)).chunk(2, dim=1)
        patches = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        return _unpatch(patches, self.patch, model.out_channels)


class _OriginalParts:
    """How to walk an OriginalDiT."""

    def __init__(self, model: OriginalDiT) -> None:
        self.model = model
        self.blocks = list(model.blocks)
        self.patch = model.patch_size

    def paths(self, layer: int) -> tuple[str, str]:
        return f"blocks.{layer}.attn", f"blocks.{layer}.mlp"

    def tokens(self, x: Tensor) -> Tensor:
        return self.model.x_embedder(x) + self.model.pos_embed

    def modulation(self, block: Any, t: Tensor, y: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        return block.adaLN_modulation(self.model.t_embedder(t) + self.model.y_embedder(y)).chunk(6, dim=1)

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        return block.norm1, block.norm2

    def qkv(self, block: Any, x: Tensor) -> list[Tensor]:
        heads = block.attn.num_heads
        return [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in block.attn.qkv(x).chunk(3, dim=2)]

    def project(self, block: Any, heads: Tensor) -> Tensor:
        return block.attn.proj(heads)

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        return block.mlp.fc2(F.gelu(block.mlp.fc1(x), approximate="tanh"))

    def output(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        final = self.model.final_layer
        shift, scale = final.adaLN_modulation(self.model.t_embedder(t) + self.model.y_embedder(y)).chunk(2, dim=1)
        patches = final.linear(final.norm_final(x) * (1 + scale[:, None]) + shift[:, None])
        return _unpatch(patches, self.patch, self.model.out_channels)


def _unpatch(patches: Tensor, patch: int, channels: int) -> Tensor:
    side = math.isqrt(patches.shape[1])
    image = patches.new_empty(patches.shape[0], channels, side * patch, side * patch)
    for token in range(patches.shape[1]):
        row, column = divmod(token, side)
        pixels = patches[:, token].reshape(-1, patch, patch, channels).permute(0, 3, 1, 2)
        image[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = pixels
    return image


@dataclass
class _Site:
    """One module of one layer: its policy, its schedule and its memory."""

    kind: str
    path: str
    layer: int
    policy: SitePolicy
    full_steps: set[int]
    cache: Tensor | None = None
    score: Tensor | None = None  # [B, N]: s1 and its alternatives, as of the attention's last full step
    stale: list[list[int]] = field(default_factory=list)  # per sample and token


@dataclass
class Done:
    """What one step did, per site path: full or not, K, and the chosen tokens per sample in descending score."""

    full: dict[str, bool] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)
    chosen: dict[str, list[list[int]]] = field(default_factory=dict)


class ReferenceSampler:
    """One generation of ``model`` under ``policy``.

    ``choices[c]`` prescribes the tokens of call c (site path -> per sample the tokens); without it they are scored here,
    which random scores exclude. ``done[c]`` tells what call c did.
    """

    def __init__(
        self,
        model: DiTTransformer2DModel | OriginalDiT,
        policy: Policy,
        num_steps: int | None = None,
        choices: Sequence[Choice] | None = None,
    ) -> None:
        self.parts = _OriginalParts(model) if isinstance(model, OriginalDiT) else _DiffusersParts(model)
        self.policy, self.choices = policy, choices
        self.total = policy.sampler.steps if num_steps is None else num_steps
        self.order = list(range(self.total))
        if policy.sampler.order == "descending":
            self.order.reverse()
        self.sites: list[tuple[_Site, _Site]] = []
        for layer in range(len(self.parts.blocks)):
            attention, mlp = (
                _Site(kind, path, layer, own, full_steps(own.N, self.order, self.total))
                for kind, path in zip(("self_attention", "mlp"), self.parts.paths(layer), strict=True)
                for own in [policy.for_site(kind, path, layer)]
            )
            self.sites.append((attention, mlp))
        self.done: list[Done] = []

    def step(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model's output for the next step of the generation."""
        parts, call = self.parts, len(self.done)
        self.done.append(Done())
        self.grid = (x.shape[2] // parts.patch, x.shape[3] // parts.patch)
        s = self.order[call]
        tokens = parts.tokens(x)
        for block, (attention, mlp) in zip(parts.blocks, self.sites, strict=True):
            modulation = parts.modulation(block, t, y, tokens.dtype)
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (part[:, None] for part in modulation)
            norm_msa, norm_mlp = parts.norms(block)

            query, key, value = parts.qkv(block, norm_msa(tokens) * (1 + scale_msa) + shift_msa)
            attention_map = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(query.shape[3]), dim=3)
            mixed = (attention_map @ value).transpose(1, 2).flatten(2)
            score = _score(mlp.policy, attention_map, key, value)
            tokens = tokens + gate_msa * self._cached(attention, s, parts.project(block, mixed))

            computed = parts.mlp(block, norm_mlp(tokens) * (1 + scale_mlp) + shift_mlp)
            tokens = tokens + gate_mlp * self._cached(mlp, s, computed)
            # A step's choice is made before the step, so a renewed map serves from the next step on.
            always = attention.policy.action.mode == "compute"
            if s in (mlp if always else attention).full_steps:
                mlp.score = score
        return parts.output(tokens, t, y)

    def _cached(self, site: _Site, s: int, computed: Tensor) -> Tensor:
        """What the site contributes on step s, given what it would compute for all tokens."""
        done = self.done[-1]
        if site.policy.action.mode == "compute":
            return computed
        batch, count, _ = computed.shape
        done.full[site.path] = s in site.full_steps
        if s in site.full_steps:
            site.cache = computed.clone()
            site.stale = [[0] * count for _ in range(batch)]
            return computed
        assert site.cache is not None, "the first step is full"
        if site.policy.action.mode == "reuse":
            return site.cache
        chosen = self._choose(site, s)
        done.count[site.path], done.chosen[site.path] = len(chosen[0]), chosen
        for sample, fresh in enumerate(chosen):
            site.stale[sample] = [0 if token in fresh else missed + 1 for token, missed in enumerate(site.stale[sample])]
            for token in fresh:
                site.cache[sample, token] = computed[sample, token]
        return site.cache.clone()

    def _choose(self, site: _Site, s: int) -> list[list[int]]:
        if self.choices is not None:
            return [list(tokens) for tokens in self.choices[len(self.done) - 1][site.path]]
        assert site.score is not None
        assert not site.policy.scores.random, "random numbers cannot be repeated here; give choices"
        batch, count = site.score.shape
        over = site.policy.scores.staleness_over or site.policy.N.base
        scores = [
            [float(site.score[sample, token]) + site.policy.scores.staleness / over * site.stale[sample][token] for token in range(count)]
            for sample in range(batch)
        ]
        if self.policy.guidance.selection == "shared":
            half = batch // 2
            for sample in range(half):
                both = zip(scores[sample], scores[sample + half], strict=True)
                scores[sample] = scores[sample + half] = [(a + b) / 2 for a, b in both]
        if site.policy.spatial is not None:
            scores = [bonus_by_hand(row, self.grid, site.policy.spatial.grid, site.policy.spatial.bonus) for row in scores]
        fresh = fresh_count(site.policy, s, self.total, site.layer, len(self.sites) - 1, count)
        return [sorted(range(count), key=lambda token: (-row[token], token))[:fresh] for row in scores]


def _score(policy: SitePolicy, attention_map: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """s1 and its alternatives from the explicit map [B, H, N, N], keys and values [B, H, N, D]: [B, N]."""

    def unit(score: Tensor) -> Tensor:
        return score / score.square().sum(dim=1, keepdim=True).sqrt()

    weights = policy.scores
    total = weights.self_attention * unit(attention_map.mean(dim=1).sum(dim=1))
    total = total + weights.value_norm * unit(value.square().sum(dim=3).sqrt().mean(dim=1))
    return total + weights.key_norm * unit(key.square().sum(dim=3).sqrt().mean(dim=1))


def bonus_by_hand(row: Sequence[float], grid: tuple[int, int], block: int, bonus: float) -> list[float]:
    """One sample's scores after the spatial bonus: in each block of the grid the first best token gains."""
    rows, columns = grid
    result = list(row)
    for top in range(0, rows, block):
        for left in range(0, columns, block):
            members = [r * columns + c for r in range(top, min(top + block, rows)) for c in range(left, min(left + block, columns))]
            best = max(members, key=lambda token: (row[token], -token))
            result[best] = row[best] + row[best] * bonus
    return result


def fresh_count(policy: SitePolicy, s: int, total: int, layer: int, last_layer: int, tokens: int) -> int:
    """K = trunc(rho N) in single precision."""

    def slope(weight: float, at: float) -> float:
        """From 1 + weight at 0 to 1 - weight at 1."""
        return 1 + weight - 2 * weight * at

    span = policy.R.layer_span or max(last_layer, 1)
    share = float(f"{1 - policy.R.base:.9f}") * slope(policy.R.layer_weight, layer / span) * slope(policy.R.step_weight, s / total)
    rho = torch.tensor(share * policy.action.weight, dtype=torch.float32).clamp(0, 1)
    return int(rho * tokens)


def full_steps(interval: Interval, order: Iterable[int], total: int) -> set[int]:
    """The full steps of one module, by walking through the generation as the authors' loop does."""
    order = list(order)
    forced = set(order[: interval.first]) | set(order[len(order) - interval.last :]) | set(interval.extra_full_steps)
    if interval.full_steps is not None:
        return set(interval.full_steps) | forced

    def interval_at(s: int) -> int:
        for window in interval.windows:
            if window.start <= s / total < window.stop:
                return window.interval
        return max(1, int(torch.tensor(interval.base / (1 + interval.drift * (1 - 2 * s / total)), dtype=torch.float64).round()))

    full: set[int] = set()
    threshold, passed = 0, 0  # the interval in force; partial steps since the last full one
    for call, s in enumerate(order):
        if interval.phase == "modulo":
            if call < interval.first or s % threshold == 0:
                threshold = interval_at(s)
                if s % threshold == 0:
                    full.add(s)
        elif s in forced or passed == threshold - 1:
            full.add(s)
            threshold, passed = interval_at(s), 0
        else:
            passed += 1
    return full | forced
