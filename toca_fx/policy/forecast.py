"""How a step that does not compute a unit makes its value of those that full steps left."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeAlias

from toca_fx.policy.keys import Key, key

Basis: TypeAlias = Literal["reuse", "newton", "taylor", "hermite", "chebyshev", "table"]
Time: TypeAlias = Literal["step", "timestep", "sigma", "log_snr"]

MAX_HISTORY = 100

_POLYNOMIALS = ("newton", "taylor", "hermite", "chebyshev")
_FORECASTS = (*_POLYNOMIALS, "table")
_key = partial(key, nullable=True)


@dataclass(frozen=True)
class Forecast:
    """A weighted sum of the values at the last full steps; None is the default of the basis.

    `weights` has a list of numbers, newest value first, for each step since the last full one; the
    last list holds from there on.
    """

    basis: Basis = field(
        default="reuse",
        metadata=_key(
            "How a unit that a step does not compute is made of its values at the last full steps. "
            "`reuse`: the last value (FORA, ToCa). `newton`: the polynomial through the last "
            "order + 1 values, at their true times. `taylor`: differences over the spacing of the "
            "last two full steps (TaylorSeer). `hermite`: as `taylor`, with Hermite polynomials "
            "scaled by `sigma` (HiCache). `chebyshev`: a ridge fit of Chebyshev polynomials up to "
            "`order` to all values kept (Spectrum). `table`: the weights are given.",
            examples=("newton", "taylor"),
        ),
    )
    order: int | None = field(
        default=None,
        metadata=_key(
            "The degree of the polynomial. Until order + 1 full steps have run it is lower. "
            "Default: 1; 4 for `chebyshev`. 0 is `reuse`.",
            minimum=0,
            maximum=8,
            examples=(1, 2),
            bases=_POLYNOMIALS,
        ),
    )
    history: int | None = field(
        default=None,
        metadata=_key(
            "How many values a unit keeps. Each takes as much memory as one. Default: order + 1; "
            "for `chebyshev` one per full step, and with a `gate` one per step; for `table` as "
            "many as it has weights for.",
            minimum=1,
            maximum=MAX_HISTORY,
            examples=(3,),
            bases=_FORECASTS,
        ),
    )
    ignore: int | None = field(
        default=None,
        metadata=_key(
            "The values of so many first full steps are not differenced against: they are used "
            "until the next full step only. Default: 0; for `taylor` and `hermite` all but two of "
            "the `N.first` ones, as their authors do.",
            minimum=0,
            maximum=100,
            examples=(1,),
            bases=_FORECASTS,
        ),
    )
    sigma: float | None = field(
        default=None,
        metadata=_key(
            "The scale of the Hermite polynomials. Default: 0.5.",
            exclusive_minimum=0,
            maximum=10,
            examples=(0.5,),
            bases=("hermite",),
        ),
    )
    ridge: float | None = field(
        default=None,
        metadata=_key(
            "The penalty lambda on the coefficients of the Chebyshev fit. Default: 0.1.",
            minimum=0,
            maximum=1000,
            examples=(0.1,),
            bases=("chebyshev",),
        ),
    )
    blend: float | None = field(
        default=None,
        metadata=_key(
            "The share of the basis; the rest is the line through the last two full steps. "
            "Default: the basis alone.",
            minimum=0,
            maximum=1,
            examples=(0.5,),
            bases=_FORECASTS,
        ),
    )
    damping: float | None = field(
        default=None,
        metadata=_key(
            "Factor on what the forecast adds to the last value: 0 is `reuse`, 1 (the default) the "
            "whole forecast.",
            minimum=0,
            maximum=2,
            examples=(0.9,),
            bases=_FORECASTS,
        ),
    )
    time: Time | None = field(
        default=None,
        metadata=_key(
            "What the polynomials are polynomials of. `step` (the default): the number of the "
            "step. `timestep`: the model's timestep. `sigma` and `log_snr`: the noise level and "
            "ln of the signal-to-noise ratio, which `sampler.noise` makes of it.",
            bases=_FORECASTS,
        ),
    )
    weights: tuple[tuple[float, ...], ...] | None = field(
        default=None,
        metadata=_key(
            "The weights of the basis `table`: one list for each step since the last full one, of "
            "the newest value first; the last list holds from there on.",
            title="a list of lists of numbers, newest value first, such as [[2, -1], [3, -2]]",
            min_items=1,
            max_items=1000,
            items=Key(
                title="a list of numbers, newest value first",
                min_items=1,
                max_items=MAX_HISTORY,
                items=Key(minimum=-1000, maximum=1000),
            ),
            examples=([[2, -1], [3, -2]],),
            bases=("table",),
        ),
    )
