"""All that the graph of a step depends on, besides the model.

It is frozen and hashable: compiled graphs are kept by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from toca_fx.match.sites import Site
from toca_fx.plan.grids import SpatialBonus
from toca_fx.plan.schedule import Modes


@dataclass(frozen=True)
class AttentionScore:
    """The base score of ``site``, made of the attention of the site ``attention``.

    ``weights`` are those of scores by name; every ``every``-th query counts.
    """

    site: int
    attention: int
    weights: tuple[tuple[str, float], ...]
    every: int


@dataclass(frozen=True)
class Selection:
    """The selection of the tokens of ``site`` within a step.

    It comes once the cross-attention of site ``attention`` has run; s2 counts ``weight`` times, and
    ``spatial`` is the bonus.
    """

    site: int
    attention: int
    weight: float
    spatial: SpatialBonus | None


@dataclass(frozen=True)
class StepSpec:
    """The kind of step on which site i is in ``modes[i]``.

    The values of the nodes ``hoisted`` are given. ``dtypes[i]`` is that of the features that site i
    keeps, "model" or a name in torch, ``histories[i]`` how many values of them it does. The sites
    of each of ``runs`` share a cache. ``keys`` are the attentions whose keys and values are kept,
    and renewed or read; ``entropies`` the cross-attentions whose entropy is renewed; ``scores`` the
    base scores that are. With ``shared`` both halves of the batch share one selection.
    """

    sites: tuple[Site, ...]
    modes: Modes
    hoisted: tuple[str, ...]
    dtypes: tuple[str, ...]
    histories: tuple[int, ...]
    runs: tuple[tuple[int, ...], ...]
    keys: tuple[int, ...]
    entropies: tuple[int, ...]
    scores: tuple[AttentionScore, ...]
    selections: tuple[Selection, ...]
    shared: bool

    def in_run(self, site: int) -> bool:
        """Whether a site shares a cache."""
        return any(site in run for run in self.runs)
