"""The batched choice of the fresh tokens, and how long tokens have been stale.

    S = w_self s1 + w_value |v| + w_key |k|  +  w_cross s2  +  w_stale n / N0  (+ w_random u)

and then the spatial bonus (ToCa, section 3.2). The first group is known when a full step has run;
``rewrite`` puts it, and the entropies that make s2, into the step graphs. Everything else is known
before a partial step starts, so ``Selector`` chooses for all sites in one batched call ahead of the
blocks. The exception is s2 where the cross-attention runs on the same step, before the site: there
``rewrite`` puts ``ranked`` itself into the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toca_fx.kernels.ranking import ranked
from toca_fx.kernels.scores import AHEAD, DRAWS, Ahead
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.grids import SpatialBonus
from toca_fx.plan.plan import Plan, StepPlan


@dataclass(frozen=True)
class _Group:
    """Sites that are selected for in one batch.

    They have equal numbers of samples and tokens, and the same spatial bonus.
    """

    sites: tuple[int, ...]
    batch: int
    tokens: int
    spatial: SpatialBonus | None


class Selector:
    """The choice of fresh tokens in one generation, and for how long tokens have been stale.

    Its tensors stay at the same addresses. Of the ``buffers`` of the generation, scores and
    entropies are read, and ``picked`` is written, but for sites that select within the step.
    """

    def __init__(self, plan: Plan, buffers: Mapping[Buffer, Tensor]) -> None:
        self._plan, self._buffers = plan, buffers
        self._groups = _groups(plan)
        scores = [buffers[Buffer("score", i)] for i in plan.scored]
        device = scores[0].device if scores else torch.device("cpu")
        dtype = scores[0].dtype if scores else torch.float32
        self._generator = None if device.type == "meta" else torch.Generator(device)
        if self._generator is not None:
            self._generator.manual_seed(plan.settings.seed)

        # Numbers from the host would have to wait for an accelerator: they go there ahead of the
        # steps, and nothing waits for them.
        def per_site(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)[:, None, None]

        weights = {i: plan.weights_ahead(i) for i in plan.scored}
        self._names = [name for name in AHEAD if any(name in found for found in weights.values())]

        def by_name(group: _Group) -> dict[str, Tensor]:
            return {
                name: per_site([weights[i].get(name, 0.0) for i in group.sites])
                for name in self._names
            }

        self._weights = [by_name(group) for group in self._groups]
        self._entropy_weight = [
            per_site([plan.weight_of_entropy(i) for i in group.sites]) for group in self._groups
        ]
        self._stale = [
            torch.zeros(len(group.sites), group.batch, group.tokens, device=device, dtype=dtype)
            for group in self._groups
        ]
        self._first_row = [
            torch.arange(group.batch, device=device)[:, None] * group.tokens
            for group in self._groups
        ]
        self._ranks = [torch.arange(group.tokens, device=device) for group in self._groups]

        def fresh(group: _Group) -> Tensor:  # [steps, sites, 1, 1]
            counts = [[[[step.fresh[i]]] for i in group.sites] for step in plan.steps]
            return torch.tensor(counts).to(device, non_blocking=True)

        self._counts = [fresh(group) for group in self._groups]
        self._step = {step.index: at for at, step in enumerate(plan.steps)}

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn."""
        return bool(DRAWS.intersection(self._names))

    def nbytes(self) -> int:
        """Bytes of the staleness counters."""
        return sum(counter.nbytes for counter in self._stale)

    def clear(self) -> None:
        """Begin a generation."""
        self.full()
        if self._generator is not None:
            self._generator.manual_seed(self._plan.settings.seed)

    def full(self) -> None:
        """Note that a full step has run: no token is stale."""
        for counter in self._stale:
            counter.zero_()

    def select(self, step: StepPlan) -> dict[Buffer, Tensor]:
        """The inputs of a step: order and ranks of each partial site, or ``known`` and ranks."""
        inside = set(self._plan.inside(step.modes))
        given: dict[Buffer, Tensor] = {}
        for at, group in enumerate(self._groups):
            known = self._known(at, group)
            for position, site in enumerate(group.sites):
                given[Buffer("ranks", site)] = self._ranks[at][: step.fresh[site]]
                if site in inside:
                    given[Buffer("known", site)] = known[position]
            ahead = {at: site for at, site in enumerate(group.sites) if site not in inside}
            if not ahead:
                continue
            weight, shared = self._entropy_weight[at], self._plan.settings.shared
            order = ranked(known, self._entropy(group), weight, shared, group.spatial)
            chosen = self._ranks[at] < self._counts[at][self._step[step.index]]
            blank = torch.zeros_like(order, dtype=torch.bool)
            picked = blank.scatter_(2, order, chosen.expand_as(order))
            torch._foreach_copy_(
                [self._buffers[Buffer("picked", site)] for site in ahead.values()],
                [picked[position] for position in ahead],
            )
            rows = order + self._first_row[at]
            given |= {
                Buffer("order", site): rows[position]
                for position, site in ahead.items()
                if step.modes[site] == "partial"
            }
        return given

    def advance(self) -> None:
        """Note that a step has run: every token is one step staler, but for the fresh ones."""
        for at, group in enumerate(self._groups):
            picked = torch.stack([self._buffers[Buffer("picked", i)] for i in group.sites])
            self._stale[at].add_(1).masked_fill_(picked, 0)

    def _known(self, at: int, group: _Group) -> Tensor:
        """Scores [sites, B, N] but for s2 and the spatial bonus."""
        score = torch.stack([self._buffers[Buffer("score", i)] for i in group.sites])
        known = Ahead(self._stale[at], self._generator)
        for name in self._names:
            score = score + self._weights[at][name] * AHEAD[name](known)
        return score

    def _entropy(self, group: _Group) -> Tensor | None:
        """Entropies [sites, B, N] from the last run of each cross-attention.

        None if no site of the group is scored by them.
        """
        sources = [self._plan.entropy_of(i) for i in group.sites]
        buffers = self._buffers
        found = [None if at is None else buffers[Buffer("entropy", at)] for at in sources]
        some = next((entropy for entropy in found if entropy is not None), None)
        if some is None:
            return None
        nothing = torch.zeros_like(some)
        return torch.stack([nothing if entropy is None else entropy for entropy in found])


def _groups(plan: Plan) -> list[_Group]:
    members: dict[tuple[int, int, SpatialBonus | None], list[int]] = {}
    for index in plan.scored:
        site = plan.sites[index]
        key = (site.shape[0], site.tokens, plan.spatial[index])
        members.setdefault(key, []).append(index)
    return [_Group(tuple(sites), *key) for key, sites in members.items()]
