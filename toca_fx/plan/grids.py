"""The grid that a site's tokens form, for the spatial bonus (s4; ToCa, section 3.2)."""

from __future__ import annotations

import math
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
    """Rows and columns of the patches of the latents, if there are as many as ``tokens``.

    ``aspect`` is height and width of the latents, None if they are no image. Nothing is guessed:
    None where no square patch makes so many.
    """
    height, width = aspect or (0, 0)
    for patch in range(1, math.gcd(height, width) + 1):
        if height % patch == 0 and width % patch == 0:
            rows, columns = height // patch, width // patch
            if rows * columns == tokens:
                return rows, columns
    return None


def spatial_bonus(
    site: Site, wanted: Spatial | None, aspect: tuple[int, int] | None, source: str
) -> SpatialBonus | None:
    """The bonus of a site on the grid of its tokens.

    Raises:
        PolicyError: the tokens form no grid, or none that is known; ``source`` is the policy's file
            or name.
    """
    if wanted is None:
        return None
    grid = token_grid(site.tokens, aspect)
    if grid is not None:
        return SpatialBonus(grid, wanted.grid, wanted.bonus)
    if aspect is None:
        why = "form no grid that is known: the model's latents are no image [B, C, H, W]"
    else:
        why = f"form no grid: the latents of {aspect[0]} x {aspect[1]} have no so many patches"
    message = (
        f"spatial: the {site.tokens} tokens of `{site.path}` {why}; switch the bonus off for it by "
        f'a rule, {{path: "{site.path}", spatial: "off"}}, or leave `spatial` out'
    )
    raise PolicyError([Problem.at(source, message)])
