"""``toca_fx.calibrate``: a policy whose full steps are placed for a model and its sampler."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

from torch import Tensor

from toca_fx.diagnostics import count
from toca_fx.policy import WHOLE_GRAINS, Forecast, Policy, PolicySource, load_policy
from toca_fx.policy.dump import to_mapping
from toca_fx.quality.course import Course, Errors
from toca_fx.quality.forecasting import Forecasting
from toca_fx.quality.placement import place, polish
from toca_fx.quality.record import Recording, course, record
from toca_fx.quality.refine import Schedule, refine
from toca_fx.quality.samples import Run, model_of, sample_of
from toca_fx.quality.stand_in import Answer, Sample

_ORDERS = (1, 2)
_EMPHASES = (8.0, 1.0)  # on the first step against the last: what the model makes of its errors
_MOST_STEPS = 128  # that order 2 is placed on by itself: it takes their fourth power of operations

log = logging.getLogger(__name__)


def calibrate(
    target: Any,
    runs: Sequence[Run],
    full: int = 21,
    policy: PolicySource | None = None,
    *,
    order: int | None = None,
    budget: float = 8.0,
) -> Policy:
    """A policy that computes ``target`` on the ``full`` steps where that matters most, and
    forecasts the whole of it on the others.

    ``target`` is the denoising model, or a diffusers pipeline with a ``transformer``. Each of
    ``runs`` is one generation: keyword arguments for the pipeline, or a function ``run(model)``
    that samples with the user's own loop and returns the final latents or images (a tensor, or
    something with ``images``). They have the same number of steps; prompts and seeds differ.

    The first run is recorded and replayed, and an exact dynamic program places the steps by what
    the errors of forecasts do to the final result. That takes one generation, some seconds, and the
    host's memory for what the model says in a generation. The others refine: schedules are run in
    earnest, as many as take the time of ``budget`` uncached generations, and the one with the best
    final results is kept. With a single run there is nothing to refine by.

    ``policy`` is what the result is made from (its forecast too, unless that is ``reuse``), else
    one for this model alone; ``order`` is that of the forecast, by default 1 or 2 by what comes
    out.

    Raises:
        ValueError: ``full`` is no number of these steps; ``order`` is neither 0, 1 nor 2; the runs
            cannot be followed, or their number of steps differs.
        TypeError: a target or a run of another kind.
        PolicyError: the policy has problems.
    """
    given = None if policy is None else load_policy(policy)
    forecasts = _forecasts(given, order)
    model = model_of(target)
    if not runs:
        raise ValueError("calibrate(runs=[]): expected at least one run")
    samples = [sample_of(target, run, f"runs[{index}]") for index, run in enumerate(runs)]
    recorded = record("runs[0]", samples[0], model)
    found = course("runs[0]", samples[0], recorded)
    if order is None and recorded.steps > _MOST_STEPS:
        forecasts = forecasts[:1]
    errors = {forecast: Errors(found, forecast) for forecast in forecasts}

    def predicted(schedule: Schedule) -> float:
        return errors[schedule.forecast].total(schedule.full)

    candidates = [*_candidates(found, forecasts, full)]
    if len(samples) == 1:
        log.warning("calibrate: of a single run nothing is left to refine by, or to validate with")
        best, measured = min(candidates, key=predicted), ""
    else:
        judge = _Judge(model, samples[1:], recorded)
        most = max(1, int(budget * recorded.steps / (full * len(judge.finals))))
        best, error = refine(candidates, recorded.steps, judge.error, predicted, most)
        others = count(len(judge.finals), "other run")
        measured = f", {_psnr(judge.finals, error):.1f} dB measured on {others}"
    expected = _psnr([recorded.final], predicted(best) / recorded.final.numel())
    described = (
        f"{full} of {recorded.steps} steps, placed by toca_fx.calibrate for "
        f"{type(model).__name__}. PSNR to uncached: {expected:.1f} dB predicted{measured}."
    )
    log.info("%s %s", described, [*best.full])
    return _policy(given, type(model).__name__, recorded, best, described)


def _forecasts(given: Policy | None, order: int | None) -> list[Forecast]:
    """What is tried: the forecast of the policy if it has one, else newton, in each order."""
    base = Forecast(basis="newton")
    if given is not None and given.forecast.basis != "reuse":
        base = replace(given.forecast, history=None, ignore=None)
        order = base.order if order is None else order
    if base.basis not in ("newton", "taylor", "hermite") or base.time not in (None, "step"):
        raise ValueError(
            f"calibrate: no steps can be placed for a forecast with `basis: {base.basis}` and "
            f"`time: {base.time or 'step'}`: expected `newton`, `taylor` or `hermite` over steps"
        )
    if order not in (None, 0, *_ORDERS):
        raise ValueError(f"calibrate(order={order!r}): expected 0, 1 or 2")
    return [replace(base, order=each) for each in (_ORDERS if order is None else (order,))]


def _candidates(found: Course, forecasts: Sequence[Forecast], full: int) -> Iterator[Schedule]:
    """The schedules that the course asks for: one for each forecast and emphasis."""
    for forecast in forecasts:
        for emphasis in _EMPHASES:
            errors = Errors(found.emphasised(emphasis), forecast)
            yield Schedule(forecast, polish(errors, place(errors, full)))


class _Judge:
    """What schedules do to the final results of runs, in earnest."""

    def __init__(self, model: Answer, samples: Sequence[Sample], recorded: Recording) -> None:
        self._model, self._samples, self._recorded = model, samples, recorded
        self.finals = [self._uncached(index + 1, sample) for index, sample in enumerate(samples)]

    def _uncached(self, index: int, sample: Sample) -> Tensor:
        calls = 0

        def answer(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            return self._model(*args, **kwargs)

        final = sample(answer)
        if calls != len(self._recorded.outputs):
            raise ValueError(
                f"runs[{index}] calls the model {calls} times, but runs[0] does so "
                f"{len(self._recorded.outputs)} times: a schedule is for one number of steps"
            )
        return final

    def error(self, schedule: Schedule) -> float:
        """The mean square over all results of what ``schedule`` changes."""
        return mean(
            float((sample(self._forecasting(schedule)) - final).double().square().mean())
            for sample, final in zip(self._samples, self.finals, strict=True)
        )

    def _forecasting(self, schedule: Schedule) -> Forecasting:
        return Forecasting(self._model, schedule.forecast, schedule.full, self._recorded.branches)


def _psnr(finals: Sequence[Tensor], error: float) -> float:
    """Of a mean square ``error``, in dB of the range of the uncached results."""
    peak = max(float(final.max()) for final in finals) - min(float(final.min()) for final in finals)
    return 10 * math.log10(peak**2 / error) if error else math.inf


def _policy(
    given: Policy | None, model: str, recorded: Recording, best: Schedule, described: str
) -> Policy:
    """The policy ``given``, or a small one, with a schedule."""
    kept: dict[str, Any] = {"version": 1, "name": "calibrated", "model": [model]}
    if given is None:
        layout = (
            "separate" if recorded.branches > 1 else "batched" if recorded.halves > 1 else "none"
        )
        kept["guidance"] = {"layout": layout}
    else:
        kept = to_mapping(given)
        described = " ".join(filter(None, (given.description, described)))
    steps, at = recorded.steps, best.full
    sampler = {**kept.get("sampler", {}), "steps": steps}
    if sampler.get("order") == "descending":
        at = tuple(steps - 1 - step for step in reversed(at))
    cache, forecast = kept.get("cache", {}), kept.get("forecast", {})
    grain = cache.get("grain") if cache.get("grain") in WHOLE_GRAINS else "output"
    placed = {
        "description": described,
        "sampler": sampler,
        "N": {"full_steps": {"of": steps, "at": [*at]}},
        "cache": {**cache, "grain": grain},
        "forecast": {
            **_without(forecast, "history", "ignore"),
            "basis": best.forecast.basis,
            "order": best.forecast.order,
        },
    }
    return load_policy({**_without(kept, "skip", "gate"), **placed})


def _without(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}
