"""Forecasts of a model's output that no policy has, on placed full steps: are they any better?

    python -m tools.frontier.tried digits
    python -m tools.frontier.tried emoji --weights FOLDER

All rules skip the same steps, so that their work is the same; PSNRs are to the uncached 50 steps.
Ridge weights are fitted on an uncached run from the noise of another seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from toca_fx.plan.forecast import weights
from toca_fx.policy import Forecast, Policy, load_policy
from tools.frontier import measures
from tools.frontier.setups import STEPS, Setup, setup_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
POLICIES = {"digits": ("digits", "digits-fast"), "emoji": ("flux-dev", "flux-dev-fast")}
CONDITIONAL = {"digits": 0, "emoji": 1}  # the half of the batch

Values: TypeAlias = Sequence[tuple[int, Tensor]]  # of the full steps so far, the newest last
Rule: TypeAlias = Callable[[Values, int], Tensor]


class Skipping:
    """The denoiser: its output is forecast by ``rule`` on all steps but the ``full`` ones."""

    def __init__(self, model: Any, full: Sequence[int], rule: Rule) -> None:
        self._model, self._full, self._rule = model, frozenset(full), rule
        self._values: list[tuple[int, Tensor]] = []
        self._step = 0

    def __call__(self, *inputs: Any, **options: Any) -> tuple[Tensor, ...]:
        """The model's outputs."""
        at, self._step = self._step, self._step + 1
        if at not in self._full:
            return (self._rule(self._values, at),)
        outputs: tuple[Tensor, ...] = self._model(*inputs, **options)
        self._values.append((at, outputs[0]))
        return outputs


def newton(values: Values, at: int, order: int) -> Tensor:
    """The polynomial through the last ``order`` + 1 values, as policies have it."""
    found = newton_weights([time for time, _ in values], at, order)
    return sum_of(found, [value for _, value in reversed(values)])


def newton_weights(times: Sequence[int], at: int, order: int) -> tuple[float, ...]:
    """The weights of the values at ``times``, the newest first."""
    used = tuple(map(float, times[-order - 1 :]))
    rule = Forecast(basis="newton", order=order)
    return weights(rule, used, float(at), at - times[-1], len(times))


def sum_of(given: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """The weighted sum of as many of the values as there are weights."""
    return torch.stack([w * v.double() for w, v in zip(given, values, strict=False)]).sum(0).float()


def guided(values: Values, at: int, conditional: int, own: int, other: int, share: float) -> Tensor:
    """The conditional half by order ``own``; its difference to the other half by order ``other``,
    ``share`` of the way from the newest one.
    """
    halves = [(time, value.chunk(2)) for time, value in values]
    mine = [(time, both[conditional]) for time, both in halves]
    apart = [(time, both[conditional] - both[1 - conditional]) for time, both in halves]
    found = newton(mine, at, own)
    moved = torch.lerp(apart[-1][1], newton(apart, at, other), share)
    made = [found - moved, found - moved]
    made[conditional] = found
    return torch.cat(made)


def frequencies(values: Values, at: int, low: int, high: int, share: float) -> Tensor:
    """Frequencies below ``share`` of the highest by order ``low``, the others by order ``high``."""
    below, above = newton(values, at, low), newton(values, at, high)
    rows, columns = (torch.fft.fftfreq(size) for size in below.shape[-2:])
    inside = (rows[:, None].square() + columns.square()).sqrt() < share / 2
    return torch.fft.ifft2(torch.where(inside, torch.fft.fft2(below), torch.fft.fft2(above))).real


def fitted(outputs: Sequence[Tensor], full: Sequence[int], count: int, ridge: float) -> Rule:
    """Weights by step that make the least error on a run's ``outputs``.

    ``ridge`` holds them to the line through the last two values; it is in units of their energy.
    """
    table: dict[int, list[float]] = {}
    for at in (at for at in range(len(outputs)) if at not in full):
        known = [(time, outputs[time]) for time in full if time < at]
        used = [value.double().flatten() for _, value in known[-count:][::-1]]
        line = newton_weights([time for time, _ in known], at, 1)
        prior = torch.zeros(len(used), dtype=torch.float64)
        prior[: len(line)] = torch.tensor(line, dtype=torch.float64)[: len(used)]
        matrix = torch.stack(used)
        gram = matrix @ matrix.T
        held = ridge * gram.diagonal().mean() * torch.eye(len(used), dtype=torch.float64)
        aim = matrix @ outputs[at].double().flatten() + held @ prior
        table[at] = torch.linalg.solve(gram + held, aim).tolist()

    def rule(values: Values, at: int) -> Tensor:
        return sum_of(table[at], [value for _, value in reversed(values)])

    return rule


def rules(model: str, outputs: Sequence[Tensor], full: Sequence[int]) -> Mapping[str, Rule]:
    """All that is tried, by name."""
    found: dict[str, Rule] = {f"order {order}": partial(newton, order=order) for order in range(4)}
    conditional = CONDITIONAL[model]
    for own, other, share in ((1, 0, 1.0), (1, 1, 0.5), (1, 2, 1.0), (2, 0, 1.0), (2, 1, 1.0)):
        name = f"conditional order {own}, guidance's difference order {other}"
        name += f" x {share}" if share < 1 else ""
        found[name] = partial(guided, conditional=conditional, own=own, other=other, share=share)
    for low, high in ((0, 1), (1, 0), (1, 2), (2, 1), (0, 2)):
        for share in (0.25, 0.5):
            name = f"frequencies below {share} order {low}, others {high}"
            found[name] = partial(frequencies, low=low, high=high, share=share)
    for count in (2, 3):
        for ridge in (1e-6, 1e-4, 1e-2):
            found[f"ridge, {count} values, {ridge:g}"] = fitted(outputs, full, count, ridge)
    return found


def recorded(setup: Setup, seed: int) -> list[Tensor]:
    """The model's outputs on all steps of an uncached run."""
    outputs: list[Tensor] = []

    def denoiser(*inputs: Any, **options: Any) -> tuple[Tensor, ...]:
        made: tuple[Tensor, ...] = setup.model(*inputs, **options)
        outputs.append(made[0])
        return made

    setup.sample(denoiser, setup.samplers[setup.own](STEPS), seed=seed)
    return outputs


def asked(prog: str, argv: Sequence[str] | None) -> Setup:
    """What the command line of ``prog`` asks for; it ends the process if that cannot be had."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("model", choices=POLICIES)
    parser.add_argument("--weights", type=Path, help="the folder of the emoji model's weights")
    parser.add_argument("--samples", type=int, help="default: 40 digits, 16 emoji")
    arguments = parser.parse_args(argv)
    try:
        return setup_of(arguments.model, arguments.samples, arguments.weights)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def placed(policy: Policy) -> list[int]:
    """The full steps that a policy lists."""
    return [int(at) for at in policy.N.full_steps.at]  # type: ignore[union-attr]


def keep(setup: Setup, what: str, **found: Any) -> None:
    """Write what was found."""
    says = {"weights": setup.weights, "samples": setup.shape[0], **found}
    file = RESULTS / f"frontier-{setup.name}-{what}.json"
    file.write_text(json.dumps(says, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all rules, and keep what was found."""
    setup = asked("python -m tools.frontier.tried", argv)
    outputs = recorded(setup, seed=1)
    expected = setup.sample(setup.model, setup.samplers[setup.own](STEPS), seed=0)
    found: dict[str, dict[str, float]] = {}
    for name in POLICIES[setup.name]:
        full = placed(load_policy(name))
        for rule_name, rule in rules(setup.name, outputs, full).items():
            denoiser = Skipping(setup.model, full, rule)
            images = setup.sample(denoiser, setup.samplers[setup.own](STEPS), seed=0)
            found.setdefault(rule_name, {})[name] = measures.psnr(expected, images)
            print(f"{name:16} {rule_name:60} {found[rule_name][name]:.1f}", flush=True)
    keep(setup, "tried", psnr=found)


if __name__ == "__main__":
    main()
