"""All that the graph of a step depends on, besides the model: frozen, and so the key under which
the compiled graph is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from toca_fx.match.sites import Site
from toca_fx.plan.grids import SpatialBonus
from toca_fx.plan.schedule import Modes


@dataclass(frozen=True)
class AttentionScore:
    """The base score of ``site``: ``weights`` by the names of scores that are made of the operands
    or the map of the attention of site ``attention``; the map is seen for every ``every``-th query.
    """

    site: int
    attention: int
    weights: tuple[tuple[str, float], ...]
    every: int


@dataclass(frozen=True)
class Selection:
    """``site`` selects its tokens within the step, once the cross-attention of site ``attention``
    has run: by ``weight`` times s2, and with the spatial bonus.
    """

    site: int
    attention: int
    weight: float
    spatial: SpatialBonus | None


@dataclass(frozen=True)
class StepSpec:
    """A step on which site i is in ``modes[i]``.

    The values of the nodes ``hoisted`` are given. ``dtypes[i]`` is that of the features that site i
    keeps, "model" or a name in torch. The sites of each of ``runs`` share a cache. ``keys`` are the
    attentions whose keys and values are kept, and renewed or read; ``entropies`` the
    cross-attentions whose entropy is renewed; ``scores`` the base scores that are. With ``shared``
    both halves of the batch share one selection.
    """

    sites: tuple[Site, ...]
    modes: Modes
    hoisted: tuple[str, ...]
    dtypes: tuple[str, ...]
    runs: tuple[tuple[int, ...], ...]
    keys: tuple[int, ...]
    entropies: tuple[int, ...]
    scores: tuple[AttentionScore, ...]
    selections: tuple[Selection, ...]
    shared: bool

    def in_run(self, site: int) -> bool:
        """Whether a site shares a cache."""
        return any(site in run for run in self.runs)
