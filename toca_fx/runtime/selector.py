"""Scores of tokens, and the batched choice of the fresh ones (ToCa, section 3.2).

    S = w_self s1 + w_value |v| + w_key |k|  +  w_cross s2  +  w_stale n / N0   (+ w_random u),   then the spatial bonus

The first group is known when a full step has run; ``rewrite`` puts it, and the entropies that make
s2, into the step graphs. Everything else is known before a partial step starts, so ``Selector``
chooses for all sites in one batched call ahead of the blocks. The exception is s2 where the
cross-attention runs on the same step, before the site: there ``rewrite`` puts ``ranked`` itself
into the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toca_fx.diagnostics import PolicyError, Problem
from toca_fx.kernels.influence import normalize
from toca_fx.plan.plan import Plan, StepPlan
from toca_fx.policy import Policy

Spatial = tuple[
    tuple[int, int], int, float
]  # grid of the tokens (rows, columns), cells of so many tokens squared, bonus


def token_grid(tokens: int, aspect: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of ``tokens`` in the proportions of the latent image ``aspect`` (height,
    width), if they fit.
    """
    height, width = aspect or (1, 1)
    for patch in range(1, max(height, width) + 1):
        if (
            height % patch == 0
            and width % patch == 0
            and (height // patch) * (width // patch) == tokens
        ):
            return height // patch, width // patch
    side = int(tokens**0.5)
    return (side, side) if side * side == tokens else None


def spatial_bonus(score: Tensor, grid: tuple[int, int], block: int, bonus: float) -> Tensor:
    """s4: in each ``block`` x ``block`` cell of the token ``grid``, multiply the best token's score
    by 1 + ``bonus``.

    ``score`` [..., N], N = rows x columns. The first maximum wins a tie; cells at the border may be
    cut off.
    """
    rows, columns = grid
    pad_rows, pad_columns = -rows % block, -columns % block
    cells = score.reshape(-1, rows, columns)
    cells = torch.nn.functional.pad(cells, (0, pad_columns, 0, pad_rows), value=-torch.inf)
    down, across = cells.shape[1] // block, cells.shape[2] // block
    cells = cells.reshape(-1, down, block, across, block).transpose(2, 3).flatten(3)
    best = torch.zeros_like(cells, dtype=torch.bool).scatter_(
        3, cells.argmax(3, keepdim=True), True
    )
    best = best.reshape(-1, down, across, block, block).transpose(2, 3)
    best = best.reshape(-1, down * block, across * block)[:, :rows, :columns]
    return torch.where(best.reshape(score.shape), score + score * bonus, score)


@dataclass(frozen=True)
class _Group:
    """Sites with equal numbers of samples and tokens and the same spatial bonus: one batched
    selection.
    """

    sites: tuple[int, ...]
    batch: int
    tokens: int
    spatial: Spatial | None


def ranked(
    known: Tensor,
    entropy: Tensor | None,
    weight: Tensor | float,
    shared: bool,
    spatial: Spatial | None,
) -> Tensor:
    """Token indices in descending score; of equal scores the lower index comes first.

    ``known`` [..., B, N] are the scores but for s2; ``entropy`` [..., B, N] makes s2 = L2norm(1 +
    H), times ``weight``. With ``shared`` the two halves of the batch get one score: the mean of the
    known ones, and s2 of the summed entropies.
    """
    score = (
        _halves(known).mean(-3, keepdim=True).expand_as(_halves(known)).flatten(-3, -2)
        if shared
        else known
    )
    if entropy is not None:
        if shared:
            entropy = (
                _halves(entropy).sum(-3, keepdim=True).expand_as(_halves(entropy)).flatten(-3, -2)
            )
        score = score + weight * normalize(1 + entropy)
    if spatial is not None:
        score = spatial_bonus(score, *spatial)
    return torch.sort(score, dim=-1, descending=True, stable=True).indices


def _halves(score: Tensor) -> Tensor:
    """[..., B, N] -> [..., 2, B / 2, N]."""
    return score.reshape(*score.shape[:-2], 2, -1, score.shape[-1])


class Selector:
    """Chooses the fresh tokens of every scored site for one step, and counts how long tokens have
    been stale.

    State of one generation (so: one Selector per generation and guidance branch), which stays at
    the same addresses. ``buffers`` are the generation's: ``score:i`` and ``entropy:i`` are read
    here; ``picked:i`` are written here, but for sites that select within the step.
    """

    def __init__(
        self,
        plan: Plan,
        policy: Policy,
        buffers: Mapping[str, Tensor],
        aspect: tuple[int, int] | None,
    ) -> None:
        self._plan, self._buffers = plan, buffers
        self._shared = policy.guidance.selection == "shared"
        self._groups = _groups(plan, aspect, policy.source)
        scores = [buffers[f"score:{i}"] for i in plan.scored]
        device = scores[0].device if scores else torch.device("cpu")
        dtype = scores[0].dtype if scores else torch.float32
        self._seed = policy.seed
        self._generator = (
            None if device.type == "meta" else torch.Generator(device).manual_seed(policy.seed)
        )

        # Numbers from the host would have to wait for an accelerator: they go there ahead of the
        # steps, and nobody waits for them.
        def per_site(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)[:, None, None]

        policies = plan.policies
        self._stale_weight = [
            per_site(
                [
                    policies[i].scores.staleness
                    / (policies[i].scores.staleness_over or policies[i].N.base)
                    for i in g.sites
                ]
            )
            for g in self._groups
        ]
        self._random_weight = [
            per_site([policies[i].scores.random for i in g.sites]) for g in self._groups
        ]
        self._cross_weight = [
            per_site([policies[i].scores.cross_attention for i in g.sites]) for g in self._groups
        ]
        self._uses_random = any(policies[i].scores.random for i in plan.scored)
        self._stale = [
            torch.zeros(len(g.sites), g.batch, g.tokens, device=device, dtype=dtype)
            for g in self._groups
        ]
        self._first_row = [
            torch.arange(g.batch, device=device)[:, None] * g.tokens for g in self._groups
        ]
        self._ranks = [torch.arange(g.tokens, device=device) for g in self._groups]
        fresh = [
            [[[[step.fresh[i]]] for i in g.sites] for step in plan.steps] for g in self._groups
        ]
        self._counts = [torch.tensor(counts).to(device, non_blocking=True) for counts in fresh]
        self._step = {step.index: at for at, step in enumerate(plan.steps)}

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn."""
        return self._uses_random

    def nbytes(self) -> int:
        """Bytes of the staleness counters."""
        return sum(counter.nbytes for counter in self._stale)

    def clear(self) -> None:
        """Begin a generation."""
        self.full()
        if self._generator is not None:
            self._generator.manual_seed(self._seed)

    def full(self) -> None:
        """A full step has run: no token is stale."""
        for counter in self._stale:
            counter.zero_()

    def select(self, step: StepPlan) -> dict[str, Tensor]:
        """What the step is given (see ``buffers.given``)."""
        inside = set(self._plan.inside(step.modes))
        given: dict[str, Tensor] = {}
        for at, group in enumerate(self._groups):
            known = self._known(at, group)
            for position, site in enumerate(group.sites):
                given[f"ranks:{site}"] = self._ranks[at][: step.fresh[site]]
                if site in inside:
                    given[f"known:{site}"] = known[position]
            ahead = {
                position: site for position, site in enumerate(group.sites) if site not in inside
            }
            if not ahead:
                continue
            order = ranked(
                known, self._entropy(group), self._cross_weight[at], self._shared, group.spatial
            )
            chosen = self._ranks[at] < self._counts[at][self._step[step.index]]
            picked = torch.zeros_like(order, dtype=torch.bool).scatter_(
                2, order, chosen.expand_as(order)
            )
            torch._foreach_copy_(
                [self._buffers[f"picked:{site}"] for site in ahead.values()],
                [picked[position] for position in ahead],
            )
            rows = order + self._first_row[at]
            given |= {
                f"order:{site}": rows[position]
                for position, site in ahead.items()
                if step.modes[site] == "partial"
            }
        return given

    def advance(self) -> None:
        """A step has run: every token is one step staler, but for those just computed."""
        for at, group in enumerate(self._groups):
            picked = torch.stack([self._buffers[f"picked:{i}"] for i in group.sites])
            self._stale[at].add_(1).masked_fill_(picked, 0)

    def _known(self, at: int, group: _Group) -> Tensor:
        """Scores [sites, B, N] but for s2 and the spatial bonus."""
        score = torch.stack([self._buffers[f"score:{i}"] for i in group.sites])
        score = score + self._stale_weight[at] * self._stale[at]
        if self._uses_random:
            # One draw per sample and token from the sample's own position: a batch's first rows get
            # what they get alone.
            draw = torch.rand(
                score.shape[0],
                score.shape[2],
                generator=self._generator,
                device=score.device,
                dtype=score.dtype,
            )
            score = score + self._random_weight[at] * draw[:, None]
        return score

    def _entropy(self, group: _Group) -> Tensor | None:
        """Entropies [sites, B, N] as of the last time that each cross-attention ran; None if no
        site is scored by them.
        """
        sources = [_entropy_source(self._plan, i) for i in group.sites]
        if all(source is None for source in sources):
            return None
        known = next(self._buffers[f"entropy:{source}"] for source in sources if source is not None)
        return torch.stack(
            [
                torch.zeros_like(known) if source is None else self._buffers[f"entropy:{source}"]
                for source in sources
            ]
        )


def _entropy_source(plan: Plan, site: int) -> int | None:
    return plan.sites[site].entropy if plan.policies[site].scores.cross_attention else None


def _groups(plan: Plan, aspect: tuple[int, int] | None, source: str) -> list[_Group]:
    members: dict[tuple[int, int, Spatial | None], list[int]] = {}
    for index in plan.scored:
        site = plan.sites[index]
        members.setdefault(
            (site.shape[0], site.tokens, spatial_of(plan, index, aspect, source)), []
        ).append(index)
    return [_Group(tuple(sites), *key) for key, sites in members.items()]


def spatial_of(
    plan: Plan, index: int, aspect: tuple[int, int] | None, source: str
) -> Spatial | None:
    """The spatial bonus of a site on the grid of its tokens; raises PolicyError if they form
    none.
    """
    site, wanted = plan.sites[index], plan.policies[index].spatial
    if wanted is None:
        return None
    grid = token_grid(site.tokens, aspect)
    if grid is None:
        message = f"spatial: the {site.tokens} tokens of `{site.path}` form no grid; switch the bonus off for it by a rule"
        raise PolicyError([Problem.at(source, message)])
    return grid, wanted.grid, wanted.bonus
