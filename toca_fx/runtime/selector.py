"""The batched choice of the fresh tokens, and how long tokens have been stale.

    S = w_self s1 + w_value |v| + w_key |k| + w_small sum_h (1 - |v_h|)
        + w_cross s2  +  w_stale n / N0  (+ w_random u)

and then the spatial bonus (ToCa, section 3.2). The first group is known when a full step has run;
``rewrite`` puts it, and the entropies that make s2, into the step graphs. Everything else is known
before a partial step starts, so ``Selector`` chooses for all sites in one batched call ahead of the
blocks. The exception is s2 where the cross-attention runs on the same step, before the site: there
``rewrite`` puts ``ranked`` itself into the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from toca_fx.kernels.ranking import ranked
from toca_fx.kernels.scores import AHEAD, DRAWS, Ahead
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.plan import Plan, StepPlan
from toca_fx.plan.schedule import Modes


class _Group:
    """Sites with equal numbers of samples and tokens and the same spatial bonus: one selection.

    All tensors of a generation, and the names of what is given to its steps, are looked up once.
    """

    def __init__(
        self,
        sites: Sequence[int],
        plan: Plan,
        buffers: Mapping[Buffer, Tensor],
        names: Sequence[str],
    ) -> None:
        first = plan.sites[sites[0]]
        self.sites, self.spatial = sites, plan.spatial[sites[0]]
        self.scores = [buffers[Buffer("score", i)] for i in sites]
        self.picked = [buffers[Buffer("picked", i)] for i in sites]
        self.entropies = _entropies(sites, plan, buffers)
        self.ranks_of = [Buffer("ranks", i) for i in sites]
        self.order_of = [Buffer("order", i) for i in sites]
        self.known_of = [Buffer("known", i) for i in sites]
        device, dtype = self.scores[0].device, self.scores[0].dtype

        # Numbers from the host would have to wait for an accelerator: they go there ahead of the
        # steps, and nothing waits for them.
        def per_site(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)[:, None, None]

        weights = [plan.weights_ahead(i) for i in sites]
        self.weights = {name: per_site([own.get(name, 0.0) for own in weights]) for name in names}
        self.entropy_weight = per_site([plan.entropy_weights[i] for i in sites])
        batch, tokens, _ = first.shape
        self.stale = torch.zeros(len(sites), batch, tokens, device=device, dtype=dtype)
        self.first_row = torch.arange(batch, device=device)[:, None] * tokens
        self.ranks = torch.arange(tokens, device=device)
        fresh = [[[[step.fresh[i]]] for i in sites] for step in plan.steps]
        self.counts = torch.tensor(fresh).to(device, non_blocking=True)  # [steps, sites, 1, 1]

    def known(self, generator: torch.Generator | None) -> Tensor:
        """Scores [sites, B, N] but for s2 and the spatial bonus."""
        score, ahead = torch.stack(self.scores), Ahead(self.stale, generator)
        for name, weight in self.weights.items():
            score = score + weight * AHEAD[name](ahead)
        return score

    def entropy(self) -> Tensor | None:
        """Entropies [sites, B, N] from the last run of each cross-attention.

        None if no site of the group is scored by them.
        """
        some = next((entropy for entropy in self.entropies if entropy is not None), None)
        if some is None:
            return None
        found = [torch.zeros_like(some) if each is None else each for each in self.entropies]
        return torch.stack(found)


def _entropies(
    sites: Sequence[int], plan: Plan, buffers: Mapping[Buffer, Tensor]
) -> list[Tensor | None]:
    sources = [plan.entropy_sources[i] for i in sites]
    return [None if source is None else buffers[Buffer("entropy", source)] for source in sources]


class Selector:
    """Chooses the fresh tokens of every scored site for one step, and counts staleness.

    It is the state of one generation (so: one Selector per generation and guidance branch), and
    stays at the same addresses. Of the ``buffers`` of the generation it reads scores and entropies,
    and writes ``picked``, but for sites that select within the step.
    """

    def __init__(self, plan: Plan, buffers: Mapping[Buffer, Tensor]) -> None:
        self._plan = plan
        weighed = {name for i in plan.scored for name in plan.weights_ahead(i)}
        self._names = [name for name in AHEAD if name in weighed]
        members: dict[object, list[int]] = {}
        for i in plan.scored:
            site = plan.sites[i]
            members.setdefault((site.shape[:2], plan.spatial[i]), []).append(i)
        self._groups = [_Group(sites, plan, buffers, self._names) for sites in members.values()]
        device = self._groups[0].stale.device if self._groups else torch.device("cpu")
        self._generator = None if device.type == "meta" else torch.Generator(device)
        self._step = {step.index: at for at, step in enumerate(plan.steps)}
        self._inside: dict[Modes, frozenset[int]] = {}
        self.clear()

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn."""
        return bool(DRAWS.intersection(self._names))

    @property
    def counters(self) -> list[Tensor]:
        """For how many steps each token of some sites is stale, [sites, B, N] each."""
        return [group.stale for group in self._groups]

    def nbytes(self) -> int:
        """Bytes of the counters."""
        return sum(counter.nbytes for counter in self.counters)

    def clear(self) -> None:
        """Begin a generation."""
        self.full()
        if self._generator is not None:
            self._generator.manual_seed(self._plan.settings.seed)

    def full(self) -> None:
        """Note that a full step has run: no token is stale."""
        for group in self._groups:
            group.stale.zero_()

    def skip(self, step: StepPlan) -> None:
        """Note that a step has run no block, but for those sites that are full on it."""
        for group in self._groups:
            for at, site in enumerate(group.sites):
                if step.modes[site] == "full":
                    group.stale[at].zero_()

    def select(self, step: StepPlan) -> dict[Buffer, Tensor]:
        """The inputs of a step: order and ranks of each partial site, or ``known`` and ranks."""
        inside = self._inside.get(step.modes)
        if inside is None:
            inside = self._inside[step.modes] = frozenset(self._plan.inside(step.modes))
        given: dict[Buffer, Tensor] = {}
        for group in self._groups:
            known = group.known(self._generator)
            ahead = []
            for position, site in enumerate(group.sites):
                given[group.ranks_of[position]] = group.ranks[: step.fresh[site]]
                if site in inside:
                    given[group.known_of[position]] = known[position]
                else:
                    ahead.append(position)
            if not ahead:
                continue
            weight, shared = group.entropy_weight, self._plan.settings.shared
            order = ranked(known, group.entropy(), weight, shared, group.spatial)
            chosen = group.ranks < group.counts[self._step[step.index]]
            blank = torch.zeros_like(order, dtype=torch.bool)
            picked = blank.scatter_(2, order, chosen.expand_as(order))
            torch._foreach_copy_([group.picked[at] for at in ahead], [picked[at] for at in ahead])
            rows = order + group.first_row
            for at in ahead:
                if step.modes[group.sites[at]] == "partial":
                    given[group.order_of[at]] = rows[at]
        return given

    def advance(self) -> None:
        """Note that a step has run: every token is one step staler, but for the fresh ones."""
        for group in self._groups:
            group.stale.add_(1).masked_fill_(torch.stack(group.picked), 0)
