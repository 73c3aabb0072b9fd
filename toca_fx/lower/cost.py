"""What one kind of step costs, for every number of fresh tokens. Nothing is compiled or run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from toca_fx.lower.fake_inputs import FakeInputs
from toca_fx.lower.flops import FlopCounter, columns_flops
from toca_fx.lower.once import traced_once
from toca_fx.plan.plan import Plan, StepPlan
from toca_fx.rewrite.step_graph import StepGraph


class StepCost:
    """FLOPs and bytes of the steps of one step graph; graphs may share a ``counter``."""

    def __init__(
        self, graph: StepGraph, inputs: FakeInputs, plan: Plan, counter: FlopCounter
    ) -> None:
        self.graph = graph
        self._inputs, self._plan, self._counter = inputs, plan, counter

    def flops(self, step: StepPlan) -> int:
        """FLOPs of one run with the fresh tokens of ``step``, with the scoring that it does."""
        fixed, per_site = self._counted
        unread = 0 if step.read else sum(map(columns_flops, self.graph.module.graph.nodes))
        sites = self._plan.sites
        partial = sum(whole * step.fresh[i] // sites[i].tokens for i, whole in per_site.items())
        return fixed - unread + partial

    def nbytes(self, step: StepPlan) -> int:
        """Bytes that one run of ``step`` has to read or write at least: those of its inputs.

        Weights that no token passes through are left out.
        """
        fresh = self.graph.fresh_nodes.items()
        idle = {name for i, names in fresh if not step.fresh[i] for name in names}
        inputs = self.graph.module.graph.find_nodes(op="placeholder")
        used = [any(user.name not in idle for user in node.users) for node in inputs]
        values = zip(self._inputs.whole(), used, strict=True)
        return nbytes_of(value for value, read in values if read)

    def values(self) -> dict[str, Any]:
        """What the nodes compute if all tokens are fresh: tensors on the device "meta", by name.

        They are not kept: there are thousands.
        """
        values: dict[str, Any] = {}
        self._counter.count(self.graph.module, self._inputs.whole(), values)
        return values

    @traced_once
    def _counted(self) -> tuple[int, dict[int, int]]:
        """FLOPs that do not depend on K, and FLOPs by site if all tokens are fresh.

        The FLOPs of a site are linear in K.
        """
        flops = self._counter.count(self.graph.module, self._inputs.whole())
        per_site = {
            i: sum(flops.get(name, 0) for name in names)
            for i, names in self.graph.fresh_nodes.items()
        }
        return sum(flops.values()) - sum(per_site.values()), per_site


def nbytes_of(values: Iterable[Any]) -> int:
    """Bytes of the tensors among ``values``."""
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
