"""N: when full steps are taken. Step index s of T."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from toca_fx.policy.keys import Key, Schema, key

STEP_INDEX = Key(
    "A step index s, 0 to steps - 1, counted as `sampler.order` says.",
    minimum=0,
)

_MOST_STEPS = 100_000


@lru_cache(maxsize=256)
def exact(number: float) -> Fraction:
    """A number of a policy as it is written: 0.4 is two fifths, and no sum of powers of two.

    A step that a policy puts on a boundary is then on it, and a half is one.
    """
    return Fraction(str(number))


def _number_or_share(minimum: int) -> tuple[Schema, Schema]:
    """A number of steps, or a share of all."""
    number = {
        "type": "integer",
        "minimum": minimum,
        "maximum": _MOST_STEPS,
        "title": "a whole number, or a share of the steps below 1",
        "description": "A number of steps.",
    }
    share = {
        "type": "number",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 1,
        "description": "A share of the steps.",
    }
    return number, share


@dataclass(frozen=True)
class Window:
    """Inside start * T <= s < stop * T a full step is taken every `interval` steps."""

    start: float = field(
        metadata=key(
            "Where the window starts, as a share of the steps: it holds from * T <= s < to * T.",
            name="from",
            minimum=0,
            maximum=1,
            examples=(0.2,),
        )
    )
    stop: float = field(
        metadata=key(
            "Where the window ends (exclusive), as a share of the steps.",
            name="to",
            minimum=0,
            maximum=1,
            examples=(0.4,),
        )
    )
    interval: int = field(
        metadata=key(
            "The interval of full steps inside the window, in steps.",
            minimum=1,
            maximum=1000,
            examples=(2,),
        )
    )


@dataclass(frozen=True)
class Placement:
    """The full steps `at` of a generation of `of` steps, to be spread over others."""

    of: int = field(
        metadata=key(
            "The number of steps that `at` is for.",
            minimum=1,
            maximum=_MOST_STEPS,
            examples=(50,),
            stand_in=1,
        )
    )
    at: tuple[int, ...] = field(
        metadata=key(
            "The step indices s (0 to of - 1) that are full.",
            title="a list of step indices",
            min_items=1,
            items=STEP_INDEX,
            examples=([0, 1, 2, 3, 5, 8, 13, 21, 34],),
            stand_in=(),
        )
    )


@dataclass(frozen=True)
class Interval:
    """N: when full steps are taken. N(s) = round_half_even(base / (1 + drift - 2 drift s/T)), in
    steps.

    `first` and `last` are forced full steps at either end of a generation, as a number or a share;
    `full_steps`, when given, replaces `base`, `drift`, `growth`, `phase` and `windows`;
    `extra_full_steps` come on top. Both lists hold step indices s, `full_steps` perhaps places.
    """

    base: int = field(
        default=3,
        metadata=key(
            "Interval of full steps, in steps: a full step, then base - 1 partial ones. 1 makes "
            "every step full. The paper's N. Required unless `full_steps` is given.",
            minimum=1,
            maximum=1000,
            examples=(3, 4),
            required_unless="full_steps",
            replaced_by="full_steps",
        ),
    )
    drift: float = field(
        default=0.0,
        metadata=key(
            "Slope w of the interval over the steps: "
            "N(s) = round_half_even(base / (1 + w - 2 w s/T)). Above 0 the interval grows with the "
            "step index s (base / (1 + w) at s = 0, base / (1 - w) near s = T); below 0 it "
            "shrinks; 0 keeps it constant. No unit.",
            exclusive_minimum=-1,
            exclusive_maximum=1,
            examples=(0.4, -0.2),
            replaced_by="full_steps",
        ),
    )
    growth: float = field(
        default=0.0,
        metadata=key(
            "What each full step adds to the interval: it is floor(base + growth k) after the k-th "
            "full step past the `first` ones (Spectrum's rule). With `phase: count` only. No unit.",
            minimum=0,
            maximum=1000,
            examples=(0.75,),
            replaced_by="full_steps",
        ),
    )
    first: int | float = field(
        default=1,
        metadata=key(
            "Number of forced full steps at the beginning of a generation, or below 1 their share "
            "of the steps, rounded up. At least 1: the caches have to be filled.",
            title="a whole number from 1 on, or a share of the steps below 1",
            alternatives=_number_or_share(1),
            examples=(3, 0.2),
        ),
    )
    last: int | float = field(
        default=0,
        metadata=key(
            "Number of forced full steps at the end of a generation, or below 1 their share of the "
            "steps, rounded.",
            title="a whole number, or a share of the steps below 1",
            alternatives=_number_or_share(0),
            examples=(1, 0.05),
        ),
    )
    phase: Literal["count", "modulo", "due"] = field(
        default="count",
        metadata=key(
            "What a full step is counted from. `count`: a step is full when interval - 1 partial "
            "steps have passed since the last full one. `modulo`: when the step index s is a "
            "multiple of the interval in force, both before and after it is re-evaluated at this "
            "step (the authors' rule for DiT and PixArt). `due`: when it is one before, which is "
            "when the interval is re-evaluated (their layer 0).",
            replaced_by="full_steps",
        ),
    )
    windows: tuple[Window, ...] = field(
        default=(),
        metadata=key(
            "Stretches of the generation that have an interval of their own, for phases in which "
            "reuse hurts most. The first window that holds a step counts.",
            title="a list of windows such as {from: 0.2, to: 0.4, interval: 2}",
            items=Key(title="a window such as {from: 0.2, to: 0.4, interval: 2}"),
            examples=([{"from": 0.2, "to": 0.4, "interval": 2}],),
            replaced_by="full_steps",
        ),
    )
    full_steps: tuple[int | float, ...] | Placement | None = field(
        default=None,
        metadata=key(
            "The steps that are full; replaces `base`, `drift`, `growth`, `phase` and `windows`. "
            "`first` and `last` still hold. A list of step indices s (0 to steps - 1) is tied to "
            "the policy's own step count. A list of places, 0 to below 1, makes step floor(p T) "
            "full for each p. {of: 50, at: [...]} are step indices of 50 steps; for another number "
            "of steps it is the same share of full steps with the same density.",
            title="a list of step indices or of places such as 0.3, or a mapping such as "
            "{of: 50, at: [0, 1, 2, 5, 10]}",
            min_items=1,
            items=Key(
                "A step index s, 0 to steps - 1, counted as `sampler.order` says; or a place.",
                minimum=0,
            ),
            examples=([0, 6, 9, 12, 15, 18], [0, 0.1, 0.3, 0.6], {"of": 9, "at": [0, 1, 2, 5]}),
        ),
    )
    extra_full_steps: tuple[int, ...] = field(
        default=(),
        metadata=key(
            "Step indices s (0 to steps - 1) that are full as well, whatever the interval says. "
            "Tied to the policy's own step count.",
            title="a list of step indices",
            items=STEP_INDEX,
            examples=([45, 32],),
        ),
    )

    @property
    def by_index(self) -> bool:
        """Whether full steps are listed by index, which holds for one number of steps only."""
        listed = self.full_steps
        indices = isinstance(listed, tuple) and all(isinstance(step, int) for step in listed)
        return indices or bool(self.extra_full_steps)

    def ends(self, total: int) -> tuple[int, int]:
        """How many of `total` steps are forced to be full at the beginning and at the end."""
        first, last = self.first, self.last
        if not isinstance(first, int):
            first = max(1, math.ceil(exact(first) * total))
        if not isinstance(last, int):
            last = round(exact(last) * total)
        return first, last
