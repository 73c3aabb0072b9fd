"""On which steps to compute a model when forecasts do the others: an exact dynamic program, and
what it cannot see.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor

from toca_fx.quality.course import Errors

Steps: TypeAlias = tuple[int, ...]
_Index: TypeAlias = tuple[int | slice, ...]


def place(errors: Errors, full: int) -> Steps:
    """The ``full`` steps, 0 among them, of which the norms of what the forecasts between them do,
    stretch by stretch, have the smallest sum.

    A forecast is made of the last O + 1 full steps, so that a state of the program is those that
    the next one needs: best[m, a_1 .. a_O, k] for m full steps, the last of them a_1 < .. < a_O,
    and k the next or the end. O(K T^(O + 2)) operations.

    Raises:
        ValueError: ``full`` is not in 1 .. T.
    """
    total, order = errors.steps, max(1, errors.depth - 1)
    if not 1 <= full <= total:
        raise ValueError(f"full={full}: expected 1 to {total}, of so many steps")
    best = torch.full((full + 1, *[total] * order, total + 1), torch.inf, dtype=torch.float64)
    came = torch.zeros(best.shape, dtype=torch.int16)
    best[(0,) * best.ndim] = 0.0
    for last in range(total):
        older = slice(max(last, 1))
        there: _Index = (slice(None, -1), *[older] * order, last)
        here: _Index = (slice(1, None), *[older] * (order - 1), last, slice(last + 1, None))
        found, oldest = (best[there][..., None] + _costs(errors, last, order)).min(dim=1)
        best[here], came[here] = found, oldest.to(torch.int16)
    return _backtrack(best, came, full)


def _costs(errors: Errors, last: int, order: int) -> Tensor:
    """What the stretch behind ``last`` costs: [last] * order (older full steps) + [T - last] (up to
    the next one, or the end); infinite for what is no history.
    """
    shape = (*[max(last, 1)] * order, errors.steps - last)
    costs = torch.full(shape, torch.inf, dtype=torch.float64)
    older = list(_older(last, order))
    histories = [(*steps, last)[-errors.depth :] for steps in older]
    costs[tuple(torch.tensor(older).T)] = errors.behind(histories).norm(dim=2)
    return costs


def _older(last: int, order: int) -> Iterator[Steps]:
    """The ``order`` full steps before ``last``, ascending; 0 for each that is missing."""
    if last == 0:
        yield (0,) * order
        return
    yield from combinations(range(1, last), order)
    for known in range(order):
        for later in combinations(range(1, last), known):
            yield (*[0] * (order - known), *later)


def _backtrack(best: Tensor, came: Tensor, full: int) -> Steps:
    ends = best[full, ..., -1]
    window = [int(step) for step in torch.unravel_index(ends.argmin(), ends.shape)]
    following, steps = best.shape[-1] - 1, [window[-1]]
    for number in range(full, 1, -1):
        state: _Index = (number, *window, following)
        oldest = int(came[state])
        window, following = [oldest, *window[:-1]], window[-1]
        steps.append(window[-1])
    return tuple(reversed(steps))


def polish(errors: Errors, full: Steps) -> Steps:
    """``full`` with its steps moved, one at a time, as long as the total error falls.

    What stretches do adds up with its signs, which the sum over their norms does not see.
    """
    best, error = full, errors.total(full)
    while True:
        found = min(neighbours(best, errors.steps), key=errors.total, default=best)
        if errors.total(found) >= error:
            return best
        best, error = found, errors.total(found)


def neighbours(full: Steps, total: int) -> Iterator[Steps]:
    """The steps ``full`` of ``total`` with one of them, other than step 0, somewhere else."""
    for step in full[1:]:
        for other in range(1, total):
            if other not in full:
                yield tuple(sorted({*full} - {step} | {other}))
