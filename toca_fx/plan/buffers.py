"""The tensors that a step graph takes besides the model's own inputs: their names, shapes and
dtypes.

cache:i       output of site i, before its gate                      [B, N, C]   kept over a generation, updated in place
              (of a run that starts with i: what it adds to the stream)
keys:i:k      k-th projection of keys or values of attention i       [B, N, W]        " (both in the dtype of the policy)
score:i       base score of the tokens of site i                     [B, N]           "
entropy:i     entropy of cross-attention i                           [B, N]           "
picked:i      the tokens that site i computed on this step           [B, N] bool      "
order:i       all tokens of site i, best first, as rows of [B * N]   [B, N]      given for one step
known:i       score of site i but for this step's cross-attention    [B, N]           "
hoisted:NAME  what the node NAME computes from timestep and conditions    as it is       "
ranks:i       0 .. K - 1: how many of them site i computes           [K]              "
read          whether a later step will read the scores of this one  [] bool, CPU     " (on a GPU, to steps that score an attention)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from toca_fx.kernels.columns import score_dtype
from toca_fx.plan.plan import Modes, Plan


def kept(plan: Plan) -> list[str]:
    """Names of what a generation keeps."""
    names = [f"cache:{i}" for i in plan.cached if i not in plan.shared_by]
    names += [
        f"keys:{i}:{k}" for i in plan.remembering for k in range(len(plan.sites[i].projections))
    ]
    names += [f"score:{i}" for i in plan.scored]
    names += [f"entropy:{i}" for i in plan.entropies]
    return names + [f"picked:{i}" for i in plan.scored]


def given(plan: Plan, modes: Modes) -> list[str]:
    """Names of what a step is given."""
    inside, partial = plan.inside(modes), [i for i in plan.scored if modes[i] == "partial"]
    return [f"known:{i}" if i in inside else f"order:{i}" for i in partial] + [
        f"ranks:{i}" for i in partial
    ]


def site_of(name: str) -> int:
    """The site that a tensor belongs to."""
    return int(name.split(":")[1])


def dtype_of(plan: Plan, name: str, computed: torch.dtype) -> torch.dtype:
    """The type in which a cache, or whatever else is kept, holds values that are ``computed`` in
    another: what the policy says.
    """
    wanted = (
        plan.policies[site_of(name)].cache.dtype
        if name.startswith(("cache:", "keys:"))
        else "model"
    )
    found: torch.dtype = computed if wanted == "model" else getattr(torch, wanted)
    return found


class Buffers:
    """Makes the tensors for the sites of one graph and plan; fake ones under a fake mode."""

    def __init__(self, source: fx.GraphModule, plan: Plan) -> None:
        self._plan = plan
        self._nodes = {node.name: node for node in source.graph.nodes}

    def new(self, name: str) -> Tensor:
        """A buffer to be kept: caches uninitialised (a full step comes first), everything else
        zero; or an example of a value given.
        """
        if name == "read":
            return torch.ones((), dtype=torch.bool)
        role, of = name.split(":", maxsplit=1)
        if role == "hoisted":
            value = self._value(of)
            return torch.empty(value.shape, dtype=value.dtype, device=value.device)
        site = self._plan.sites[site_of(name)]
        value = self._value(site.output)
        if role == "cache":
            for run in self._plan.runs:
                if run[0] == site_of(name):
                    value = self._value(self._plan.sites[run[-1]].residual)
        if role == "keys":
            value = self._value(site.projections[int(name.split(":")[2])])
        if role in ("cache", "keys"):
            return torch.empty(
                value.shape, dtype=dtype_of(self._plan, name, value.dtype), device=value.device
            )
        dtype = torch.bool if role == "picked" else score_dtype(value)
        return torch.zeros(value.shape[:2], dtype=dtype, device=value.device)

    def example(self, name: str, count: Any) -> Tensor:
        """What a step with ``count`` (a number or a symbol) fresh tokens per sample would be
        given.
        """
        role = name.split(":", maxsplit=1)[0]
        value = self._value(self._plan.sites[site_of(name)].output)
        shape = (count,) if role == "ranks" else value.shape[:2]
        return torch.zeros(
            shape, dtype=score_dtype(value) if role == "known" else torch.int64, device=value.device
        )

    def _value(self, name: str) -> Tensor:
        value = self._nodes[name].meta["val"]
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, not a tensor")
        return value
