"""The grid that a site's tokens form, for the spatial bonus (s4; ToCa, section 3.2)."""

from __future__ import annotations

from typing import NamedTuple

from toca_fx.diagnostics import PolicyError, Problem
from toca_fx.match.sites import Site
from toca_fx.policy import Spatial


class SpatialBonus(NamedTuple):
    """The spatial bonus of a site whose tokens form a ``grid`` of rows x columns.

    In each cell of ``block`` x ``block`` tokens, the best token's score is multiplied by 1 +
    ``bonus``.
    """

    grid: tuple[int, int]
    block: int
    bonus: float


def token_grid(tokens: int, aspect: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of a grid of ``tokens``; None if they form none.

    ``aspect`` is height and width of the latent image, whose proportions the grid has.
    """
    height, width = aspect or (1, 1)
    for patch in range(1, max(height, width) + 1):
        if height % patch == 0 and width % patch == 0:
            rows, columns = height // patch, width // patch
            if rows * columns == tokens:
                return rows, columns
    side = int(tokens**0.5)
    return (side, side) if side * side == tokens else None


def spatial_bonus(
    site: Site, wanted: Spatial | None, aspect: tuple[int, int] | None, source: str
) -> SpatialBonus | None:
    """The bonus of a site on the grid of its tokens.

    Raises:
        PolicyError: the tokens form no grid; ``source`` is the policy's file or name.
    """
    if wanted is None:
        return None
    grid = token_grid(site.tokens, aspect)
    if grid is None:
        message = (
            f"spatial: the {site.tokens} tokens of `{site.path}` form no grid; "
            "switch the bonus off for it by a rule"
        )
        raise PolicyError([Problem.at(source, message)])
    return SpatialBonus(grid, wanted.grid, wanted.bonus)
