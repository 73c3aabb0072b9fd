"""How a step that does not compute a unit makes its value of those that full steps left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from toca_fx.policy.keys import key

Basis: TypeAlias = Literal["reuse", "newton", "taylor", "hermite", "chebyshev", "table"]
Time: TypeAlias = Literal["step", "timestep", "sigma", "log_snr"]

MAX_HISTORY = 100


@dataclass(frozen=True)
class Forecast:
    """A weighted sum of the values at the last full steps; None is the default of the basis."""

    basis: Basis = field(
        default="reuse",
        metadata=key(
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
        metadata=key(
            "The degree of the polynomial. Until order + 1 full steps have run it is lower. "
            "Default: 1; 4 for `chebyshev`. 0 is `reuse`.",
            minimum=0,
            maximum=8,
            examples=(1, 2),
        ),
    )
    history: int | None = field(
        default=None,
        metadata=key(
            "How many values a unit keeps. Each takes as much memory as one. Default: order + 1; "
            "for `chebyshev` one per full step.",
            minimum=1,
            maximum=MAX_HISTORY,
            examples=(3,),
        ),
    )
    ignore: int | None = field(
        default=None,
        metadata=key(
            "The values of so many first full steps are not differenced against: they are used "
            "until the next full step only. Default: 0; the authors of TaylorSeer have 1 on FLUX.",
            minimum=0,
            maximum=100,
            examples=(1,),
        ),
    )
    sigma: float | None = field(
        default=None,
        metadata=key(
            "The scale of the Hermite polynomials. Default: 0.5.",
            exclusive_minimum=0,
            maximum=10,
            examples=(0.5,),
        ),
    )
    ridge: float | None = field(
        default=None,
        metadata=key(
            "The penalty lambda on the coefficients of the Chebyshev fit. Default: 0.1.",
            minimum=0,
            maximum=1000,
            examples=(0.1,),
        ),
    )
    blend: float | None = field(
        default=None,
        metadata=key(
            "The share of the basis; the rest is the line through the last two full steps. "
            "Default: the basis alone.",
            minimum=0,
            maximum=1,
            examples=(0.5,),
        ),
    )
    damping: float | None = field(
        default=None,
        metadata=key(
            "Factor on what the forecast adds to the last value: 0 is `reuse`, 1 (the default) the "
            "whole forecast.",
            minimum=0,
            maximum=2,
            examples=(0.9,),
        ),
    )
    time: Time | None = field(
        default=None,
        metadata=key(
            "What the polynomials are polynomials of. `step` (the default): the number of the "
            "step. `timestep`: the model's timestep. `sigma` and `log_snr`: the noise level and "
            "ln of the signal-to-noise ratio, which `sampler.noise` makes of it.",
        ),
    )
    weights: tuple[tuple[float, ...], ...] | None = None
    """For `table`: a list per step since the last full one, the last list for all later steps; in
    it the weights of the values kept, newest first.
    """
