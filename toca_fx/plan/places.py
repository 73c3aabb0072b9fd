"""Full steps that a policy lists, for any number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from toca_fx.policy import Placement
from toca_fx.policy.interval import exact


def listed_steps(
    listed: tuple[int | float, ...] | Placement, indices: Sequence[int]
) -> frozenset[int]:
    """The step indices s that are ``listed``: as such, as places p in [0, 1), or for another number
    of steps.

    ``indices`` are all s in the order of the calls. A place is the step floor(p T).
    """
    if isinstance(listed, Placement):
        return _spread(listed, indices)
    if all(isinstance(step, int) for step in listed):
        return frozenset(map(int, listed))
    return frozenset(math.floor(exact(place) * len(indices)) for place in listed)


def _spread(placement: Placement, indices: Sequence[int]) -> frozenset[int]:
    """The full steps of a placement, for T steps: the same share of them with the same density.

    The n calls ``at``, and the end of the generation behind them, are a line that is read off at n
    T / of even distances.
    """
    total, of = len(indices), placement.of
    if total == of:
        return frozenset(placement.at)
    descending = indices[0] > indices[-1]
    calls = sorted(of - 1 - s if descending else s for s in {*placement.at})
    wanted = round(Fraction(len(calls) * total, of))
    line = (*calls, of)
    found, earliest = [], 0
    for j in range(wanted):
        whole, rest = divmod(Fraction(j * len(calls), wanted), 1)
        place = line[whole] + rest * (line[whole + 1] - line[whole])
        # Two may come down to one call: then the later one gives way, unless the end is near.
        call = max(earliest, math.floor(place * total / of))
        earliest = call + 1
        found.append(min(call, total - wanted + j))
    return frozenset(indices[call] for call in found)
