"""The order in which tokens are computed: by descending score, with the spatial bonus.

The bonus is s4 of ToCa, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toca_fx.kernels.influence import normalize

Spatial = tuple[tuple[int, int], int, float]
"""The grid of the tokens (rows, columns), the side of a cell in tokens, the bonus."""


def spatial_bonus(score: Tensor, grid: tuple[int, int], block: int, bonus: float) -> Tensor:
    """Multiply the best score of each ``block`` x ``block`` cell of the grid by 1 + ``bonus``.

    So a negative score is lowered, as in the authors' code (DuCa).

    ``score`` is [..., N], N = rows x columns of ``grid``. The first maximum wins a tie; cells at
    the border may be cut off.
    """
    rows, columns = grid
    pad_rows, pad_columns = -rows % block, -columns % block
    cells = score.reshape(-1, rows, columns)
    cells = torch.nn.functional.pad(cells, (0, pad_columns, 0, pad_rows), value=-torch.inf)
    down, across = cells.shape[1] // block, cells.shape[2] // block
    cells = cells.reshape(-1, down, block, across, block).transpose(2, 3).flatten(3)
    first = cells.argmax(3, keepdim=True)
    best = torch.zeros_like(cells, dtype=torch.bool).scatter_(3, first, True)
    best = best.reshape(-1, down, across, block, block).transpose(2, 3)
    best = best.reshape(-1, down * block, across * block)[:, :rows, :columns]
    return torch.where(best.reshape(score.shape), score + score * bonus, score)


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
    score = known
    if shared:
        both = _halves(known)
        score = both.mean(-3, keepdim=True).expand_as(both).flatten(-3, -2)
    if entropy is not None:
        if shared:
            both = _halves(entropy)
            entropy = both.sum(-3, keepdim=True).expand_as(both).flatten(-3, -2)
        score = score + weight * normalize(1 + entropy)
    if spatial is not None:
        score = spatial_bonus(score, *spatial)
    return torch.sort(score, dim=-1, descending=True, stable=True).indices


def _halves(score: Tensor) -> Tensor:
    """The two halves of the batch: [..., B, N] -> [..., 2, B / 2, N]."""
    return score.reshape(*score.shape[:-2], 2, -1, score.shape[-1])
