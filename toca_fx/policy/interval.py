"""N: when full steps are taken. Step index s of T."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from toca_fx.policy.keys import Key, key

STEP_INDEX = Key(
    "A step index s, 0 to steps - 1, counted as `sampler.order` says.",
    minimum=0,
)


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
class Interval:
    """N: when full steps are taken. N(s) = round_half_even(base / (1 + drift - 2 drift s/T)), in
    steps.

    `first` and `last` count forced full steps at either end of a generation; `full_steps`, when
    given, replaces `base`, `drift`, `phase` and `windows`; `extra_full_steps` come on top. Both
    lists hold step indices s.
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
    first: int = field(
        default=1,
        metadata=key(
            "Number of forced full steps at the beginning of a generation. At least 1: the caches "
            "have to be filled.",
            minimum=1,
            maximum=100000,
            examples=(3,),
        ),
    )
    last: int = field(
        default=0,
        metadata=key(
            "Number of forced full steps at the end of a generation.",
            minimum=0,
            maximum=100000,
            examples=(1,),
        ),
    )
    phase: Literal["count", "modulo"] = field(
        default="count",
        metadata=key(
            "What a full step is counted from. `count`: a step is full when interval - 1 partial "
            "steps have passed since the last full one. `modulo`: when the step index s is a "
            "multiple of the interval in force, both before and after it is re-evaluated at this "
            "step (the authors' rule for DiT and PixArt).",
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
    full_steps: tuple[int, ...] | None = field(
        default=None,
        metadata=key(
            "The exact step indices s (0 to steps - 1) that are full; replaces `base`, `drift`, "
            "`phase` and `windows`. `first` and `last` still hold. Tied to the policy's own step "
            "count.",
            title="a list of step indices",
            min_items=1,
            items=STEP_INDEX,
            examples=([0, 6, 9, 12, 15, 18],),
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
