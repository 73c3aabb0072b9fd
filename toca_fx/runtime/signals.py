"""The signals of gates: how much has changed since the last full step, measured on the device.

A signal is a class and a row of ``SIGNALS``. Each observes every step of a generation, and learns
of the full ones. None of them reads what it has measured: the gate does, when it decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toca_fx.kernels.gates import log_snrs, norms, relative, spectral_change
from toca_fx.plan.forecast import degree
from toca_fx.plan.plan import Plan
from toca_fx.plan.times import TIMESTEPS, time_of
from toca_fx.plan.units import WHOLE
from toca_fx.runtime.histories import Histories, Moment


class Facts(NamedTuple):
    """What is known ahead of a call: inputs of the model (None: not recognised), and memories.

    ``first_block`` computes what the first block adds to the residual stream; None: there is none.
    """

    latents: Tensor | None
    timesteps: Tensor | None
    now: Moment
    histories: Histories
    first_block: Callable[[], Tensor] | None = None


class Signal:
    """What is measured from step to step of one generation.

    It ``needs`` the model's "latents", the "output" that is made of them, or a "first block":
    without, it is None.
    """

    needs: tuple[str, ...] = ("latents",)

    def observe(self, facts: Facts) -> Tensor | None:
        """Ahead of each step: a number [] on the device. None: there is nothing to compare with."""
        raise NotImplementedError

    def begin(self, facts: Facts) -> None:
        """Ahead of a full step, which writes over what is remembered."""

    def end(self, facts: Facts, output: Tensor | None) -> None:
        """After a full step, whose ``output`` is the model's."""

    def clear(self) -> None:
        """Forget all steps so far."""
        raise NotImplementedError

    def estimate(self, observed: Sequence[float], distance: int) -> float:
        """The signal ``distance`` steps after the last full one, of what was observed since."""
        return sum(observed)


class EasyCache(Signal):
    """How much the model's output v changes, guessed from its latents x (EasyCache).

    From one of the last two full steps to the other v changed k = ||v - v'|| / ||x - x'|| times as
    much as x. Each step since adds k ||x_t - x_{t-1}|| / ||v||.
    """

    needs = ("latents", "output")

    def __init__(self, plan: Plan) -> None:
        self.clear()

    def clear(self) -> None:
        """See ``Signal``."""
        self._last: Tensor | None = None
        self._full: tuple[Tensor, Tensor] | None = None
        self._rate: Tensor | None = None  # k / ||v||, [B]

    def observe(self, facts: Facts) -> Tensor | None:
        """See ``Signal``."""
        if facts.latents is None:
            return None
        before, self._last = self._last, facts.latents.clone()
        if before is None or self._rate is None:
            return None
        return (self._rate * norms(self._last - before)).max()

    def end(self, facts: Facts, output: Tensor | None) -> None:
        """See ``Signal``."""
        if self._last is None or output is None:
            return
        before, self._full = self._full, (self._last, output.clone())
        if before is not None:
            latents, value = before
            self._rate = relative(output - value, self._last - latents) / norms(output)


class Sea(Signal):
    """How much the latents change, each frequency weighed by its signal in the noise (SeaCache).

    Each step since the last full one adds the change of ``kernels.gates.spectral_change``.
    """

    def __init__(self, plan: Plan) -> None:
        # A policy says it for this signal.
        self._noise = plan.settings.noise or "flow"
        self._table: Tensor | None = None
        self.clear()

    def clear(self) -> None:
        """See ``Signal``."""
        self._last: Tensor | None = None

    def observe(self, facts: Facts) -> Tensor | None:
        """See ``Signal``."""
        if facts.latents is None:
            return None
        before, self._last = self._last, facts.latents.clone()
        if before is None:
            return None
        return spectral_change(self._last, before, self._log_snrs(facts, before)).max()

    def _log_snrs(self, facts: Facts, latents: Tensor) -> Tensor | None:
        """By row, found on the device: nobody may have read the timesteps."""
        if facts.timesteps is None or not facts.timesteps.numel() or not latents.dim():
            return None
        flow = self._noise == "flow"
        if self._table is None:
            times = [t / TIMESTEPS if flow else float(t) for t in range(TIMESTEPS + 1)]
            table = [time_of("log_snr", 0, time, self._noise) for time in times]
            self._table = torch.tensor(table, dtype=torch.float32, device=latents.device)
        return log_snrs(facts.timesteps.to(latents.device), self._table, flow, len(latents))


class Surprise(Signal):
    """How far the last full step was from what a forecast would have made of it.

    An error e after d0 steps is taken to be e (d / d0)^(order + 1) after d steps.
    """

    def __init__(self, plan: Plan) -> None:
        self._sites = [i for i, site in enumerate(plan.sites) if site.kind in WHOLE]
        self.needs = () if self._sites else ("output",)  # of which there is no memory
        rules = [rule for sites, rule in plan.timelines if not {*sites}.isdisjoint(self._sites)]
        self._power = 1 + max(map(degree, rules), default=0)
        self.clear()

    def clear(self) -> None:
        """See ``Signal``."""
        self._expected: list[tuple[Tensor, int]] = []
        self._rate: Tensor | None = None  # e / d0^(order + 1)

    def observe(self, facts: Facts) -> Tensor | None:
        """See ``Signal``."""
        return self._rate

    def begin(self, facts: Facts) -> None:
        """See ``Signal``."""
        found = (facts.histories.forecast(site, facts.now) for site in self._sites)
        self._expected = [each for each in found if each is not None]

    def end(self, facts: Facts, output: Tensor | None) -> None:
        """See ``Signal``."""
        rates = []
        for site, (expected, distance) in zip(self._sites, self._expected, strict=False):
            value = facts.histories.newest(site).to(expected.dtype)
            rates.append(relative(value - expected, value).max() / distance**self._power)
        self._expected = []
        self._rate = torch.stack(rates).max() if rates else None

    def estimate(self, observed: Sequence[float], distance: int) -> float:
        """See ``Signal``."""
        return float(observed[-1] * distance**self._power)


class FirstBlock(Signal):
    """How far what the first block adds is from what it added at the last full step.

    That is how First Block Cache (ParaAttention, diffusers) decides, on means of absolute values.
    Measured are changes by step: ||r - r'|| / (d ||r'||), d steps after the last full one.
    """

    needs = ("first block",)

    def __init__(self, plan: Plan) -> None:
        self.clear()

    def clear(self) -> None:
        """See ``Signal``."""
        self._last: Tensor | None = None
        self._full: Tensor | None = None
        self._since = 0

    def observe(self, facts: Facts) -> Tensor | None:
        """See ``Signal``."""
        if facts.first_block is None:
            return None
        self._last, self._since = facts.first_block(), self._since + 1
        if self._full is None:
            return None
        return relative(self._last - self._full, self._full).max() / self._since

    def end(self, facts: Facts, output: Tensor | None) -> None:
        """See ``Signal``."""
        self._full, self._since = self._last, 0

    def estimate(self, observed: Sequence[float], distance: int) -> float:
        """See ``Signal``."""
        return observed[-1] * distance


SIGNALS: dict[str, Callable[[Plan], Signal]] = {
    "easycache": EasyCache,
    "first_block": FirstBlock,
    "sea": Sea,
    "surprise": Surprise,
}
