"""The tensors behind the buffers of a plan; fake ones under a fake mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.kernels.columns import score_dtype
from toca_fx.kernels.forecast import weights_dtype
from toca_fx.plan.buffers import FEATURES, Buffer
from toca_fx.plan.plan import Plan
from toca_fx.rewrite.draft import kept_dtype


class Tensors:
    """A factory of the tensors of one plan, for the sites of one graph ``source``."""

    def __init__(self, source: fx.GraphModule, plan: Plan) -> None:
        self._plan = plan
        self._nodes = {node.name: node for node in source.graph.nodes}
        # What a run keeps has the dtype of the stream behind its last site.
        self._ends = {run[0]: plan.sites[run[-1]].residual for run in plan.runs}
        self._weighed_with = {i: sites[0] for sites, _ in plan.timelines for i in sites}

    def new(self, buffer: Buffer) -> Tensor:
        """A tensor for a buffer that is kept, or an example of one that is given.

        Features are uninitialised where a full step comes first; the values of a history and
        everything else are zero, as a weight of 0 takes no NaN away.
        """
        if buffer.role == "read":
            return torch.ones((), dtype=torch.bool)
        if buffer.role == "weights":
            # Sites of one timeline share them, whatever the dtype of each.
            value = self._value(self._plan.sites[self._weighed_with[buffer.site]].output)
            count, dtype = self._plan.histories[buffer.site], weights_dtype(value.dtype)
            return torch.zeros(count, dtype=dtype, device=value.device)
        if buffer.role == "hoisted":
            value = self._value(str(buffer.part))
            return torch.empty(value.shape, dtype=value.dtype, device=value.device)
        site = self._plan.sites[buffer.site]
        value = self._value(site.output)
        if buffer.role in FEATURES:
            if buffer.role == "keys":
                value = self._value(site.projections[int(buffer.part)])
            elif buffer.site in self._ends:
                value = self._value(self._ends[buffer.site])
            dtype = kept_dtype(self._plan.dtypes, buffer, value.dtype)
            return torch.empty(value.shape, dtype=dtype, device=value.device)
        dtype = torch.bool if buffer.role == "picked" else score_dtype(value)
        return torch.zeros(value.shape[:2], dtype=dtype, device=value.device)

    def example(self, buffer: Buffer, count: Any) -> Tensor:
        """An example of a buffer for ``count`` fresh tokens per sample, a number or a symbol."""
        if buffer.role not in ("order", "known", "ranks"):
            return self.new(buffer)
        value = self._value(self._plan.sites[buffer.site].output)
        shape = (count,) if buffer.role == "ranks" else value.shape[:2]
        dtype = score_dtype(value) if buffer.role == "known" else torch.int64
        return torch.zeros(shape, dtype=dtype, device=value.device)

    def _value(self, name: str) -> Tensor:
        value = self._nodes[name].meta["val"]
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, not a tensor")
        return value
