"""Scores of tokens, and the batched choice of the fresh ones (ToCa, section 3.2).

    S = w_self s1 + w_value |v| + w_key |k|  +  w_stale n / N0   (+ w_random u),   then the spatial bonus

The first group is known when a full step has run; ``rewrite`` puts it into the full-step graph. Everything else is
known before a partial step starts, so ``Selector`` chooses for all sites in one batched call ahead of the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toca_fx.diagnostics import PolicyError, Problem
from toca_fx.plan import Plan, StepPlan
from toca_fx.policy import Policy


def token_grid(tokens: int, aspect: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of ``tokens`` in the proportions of the latent image ``aspect`` (height, width), if they fit."""
    height, width = aspect or (1, 1)
    for patch in range(1, max(height, width) + 1):
        if height % patch == 0 and width % patch == 0 and (height // patch) * (width // patch) == tokens:
            return height // patch, width // patch
    side = int(tokens**0.5)
    return (side, side) if side * side == tokens else None


def spatial_bonus(score: Tensor, grid: tuple[int, int], block: int, bonus: float) -> Tensor:
    """s4: in each ``block`` x ``block`` cell of the token ``grid``, multiply the best token's score by 1 + ``bonus``.

    ``score`` [..., N], N = rows x columns. The first maximum wins a tie; cells at the border may be cut off.
    """
    rows, columns = grid
    pad_rows, pad_columns = -rows % block, -columns % block
    cells = score.reshape(-1, rows, columns)
    cells = torch.nn.functional.pad(cells, (0, pad_columns, 0, pad_rows), value=-torch.inf)
    down, across = cells.shape[1] // block, cells.shape[2] // block
    cells = cells.reshape(-1, down, block, across, block).transpose(2, 3).flatten(3)
    best = torch.zeros_like(cells, dtype=torch.bool).scatter_(3, cells.argmax(3, keepdim=True), True)
    best = best.reshape(-1, down, across, block, block).transpose(2, 3)
    best = best.reshape(-1, down * block, across * block)[:, :rows, :columns]
    return torch.where(best.reshape(score.shape), score * (1 + bonus), score)


@dataclass(frozen=True)
class _Group:
    """Sites with equal numbers of samples and tokens and the same spatial bonus: one batched selection."""

    sites: tuple[int, ...]
    batch: int
    tokens: int
    grid: tuple[int, int] | None
    block: int
    bonus: float


class Selector:
    """Chooses the fresh tokens of every scored site for one step, and counts how long tokens have been stale.

    State of one generation (so: one Selector per generation and guidance branch). ``scores[i]`` [B, N] are the base
    scores of the plan's i-th scored site, written by the full-step graph; they are read here, never written.
    """

    def __init__(self, plan: Plan, policy: Policy, scores: Sequence[Tensor], aspect: tuple[int, int] | None) -> None:
        self._plan, self._scores = plan, dict(zip(plan.scored, scores, strict=True))
        self._shared = policy.guidance.selection == "shared"
        self._groups = _groups(plan, aspect, policy.source)
        device = scores[0].device if scores else torch.device("cpu")
        dtype = scores[0].dtype if scores else torch.float32
        self._generator = torch.Generator(device).manual_seed(policy.seed)

        def per_site(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device, dtype=dtype)[:, None, None]

        policies = plan.policies
        self._stale_weight = [
            per_site([policies[i].scores.staleness / (policies[i].scores.staleness_over or policies[i].N.base) for i in g.sites])
            for g in self._groups
        ]
        self._random_weight = [per_site([policies[i].scores.random for i in g.sites]) for g in self._groups]
        self._uses_random = any(policies[i].scores.random for i in plan.scored)
        self._stale = [torch.zeros(len(g.sites), g.batch, g.tokens, device=device, dtype=dtype) for g in self._groups]
        self._first_row = [torch.arange(g.batch, device=device)[:, None] * g.tokens for g in self._groups]

    def nbytes(self) -> int:
        """Bytes of the staleness counters."""
        return sum(counter.nbytes for counter in self._stale)

    def full(self) -> None:
        """A full step has run: no token is stale."""
        for counter in self._stale:
            counter.zero_()

    def select(self, step: StepPlan) -> dict[int, Tensor]:
        """Fresh tokens of each partially computed site: {site: int64 [B, K]}, rows of the flattened [B * N] tokens.

        In descending score; of equal scores the lower index comes first. Afterwards the counters are advanced: all
        by one, then the chosen ones (and those of sites that are full on this step) to zero.
        """
        chosen: dict[int, Tensor] = {}
        for at, group in enumerate(self._groups):
            order = self._order(at, group)
            counts = [step.fresh[i] for i in group.sites]
            rank = torch.arange(group.tokens, device=order.device)
            fresh = rank < torch.tensor(counts, device=order.device)[:, None, None]
            refreshed = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order, fresh.expand_as(order))
            self._stale[at] = (self._stale[at] + 1).masked_fill_(refreshed, 0)
            rows = order + self._first_row[at]
            for position, (site, count) in enumerate(zip(group.sites, counts, strict=True)):
                if step.modes[site] == "partial":
                    chosen[site] = rows[position, :, :count].contiguous()
        return chosen

    def _order(self, at: int, group: _Group) -> Tensor:
        """Token indices [sites, B, N] in descending score."""
        score = torch.stack([self._scores[i] for i in group.sites])
        score = score + self._stale_weight[at] * self._stale[at]
        if self._uses_random:
            # One draw per sample and token from the sample's own position: a batch's first rows get what they get alone.
            draw = torch.rand(score.shape[0], score.shape[2], generator=self._generator, device=score.device, dtype=score.dtype)
            score = score + self._random_weight[at] * draw[:, None]
        if self._shared:
            halves = score.reshape(score.shape[0], 2, -1, score.shape[2])
            score = halves.mean(1, keepdim=True).expand_as(halves).flatten(1, 2)
        if group.grid is not None:
            score = spatial_bonus(score, group.grid, group.block, group.bonus)
        return torch.sort(score, dim=-1, descending=True, stable=True).indices


def _groups(plan: Plan, aspect: tuple[int, int] | None, source: str) -> list[_Group]:
    members: dict[tuple[object, ...], list[int]] = {}
    for index in plan.scored:
        site, spatial = plan.sites[index], plan.policies[index].spatial
        grid, block, bonus = None, 0, 0.0
        if spatial is not None:
            grid, block, bonus = token_grid(site.tokens, aspect), spatial.grid, spatial.bonus
            if grid is None:
                message = f"spatial: the {site.tokens} tokens of `{site.path}` form no grid; switch the bonus off for it by a rule"
                raise PolicyError([Problem.at(source, message)])
        members.setdefault((site.shape[0], site.tokens, grid, block, bonus), []).append(index)
    return [_Group(tuple(sites), *key) for key, sites in members.items()]  # type: ignore[arg-type]
