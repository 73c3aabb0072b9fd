"""Forecasts and steps that run no block, against the slow references, in double precision: the
reference policies with other numbers in them, and what no reference policy has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import toca_fx
from tests.captured import Captured
from tests.helpers import make_inputs, make_policy, text_inputs, tiny
from tests.marks import slow_but
from tests.reference import ReferenceSampler
from tests.reference_forecast import Moment
from tests.reference_hooks import Hooks
from toca_fx.examples import build, examples, vary
from toca_fx.policy import Policy, load_policy

TOLERANCE = 1e-10
POLICIES = Path(toca_fx.__file__).parents[1] / "policies" / "reference"

Changes = Mapping[str, Any]
Sections = Mapping[str, Any]

DIT: list[tuple[str, Changes]] = [
    ("fora-dit", {}),
    ("taylorseer-dit", {}),
    ("taylorseer-dit", {"N.base": 6, "forecast.order": 1}),
    ("duca-dit", {}),
    ("duca-dit", {"N.base": 4}),
    ("duca-dit-vnorm", {"R.base": 0.9}),
]
MORE_DIT: list[tuple[str, Changes]] = [
    ("fora-dit", {"N.base": 5}),
    ("taylorseer-dit", {"N.base": 3}),
    ("taylorseer-dit", {"N.first": 4, "forecast.order": 2}),
    ("duca-dit", {"N.base": 2, "R.base": 0.8}),
    ("duca-dit-vnorm", {"N.base": 5}),
]

FLUX: list[tuple[str, Changes]] = [
    ("taylorseer-flux", {}),
    ("taylorseer-flux", {"N.first": 5, "forecast.order": 3}),
    ("hicache-flux", {}),
    ("spectrum-flux", {}),
    ("spectrum-flux", {"N.growth": 0.4, "N.first": 8}),
    ("spectrum-flux", {"N.first": 1, "forecast.blend": 0.75}),
]
MORE_FLUX: list[tuple[str, Changes]] = [
    ("taylorseer-flux", {"N.base": 6, "forecast.order": 1}),
    ("taylorseer-flux", {"N.base": 3, "forecast.order": 3}),
    ("taylorseer-flux", {"N.first": 1}),
    ("hicache-flux", {"forecast.order": 3, "forecast.sigma": 0.3}),
    ("spectrum-flux", {"N.growth": 3.0}),
    ("spectrum-flux", {"forecast.blend": None, "forecast.order": 6}),
    ("spectrum-flux", {"forecast.blend": 1.0, "forecast.history": 6}),
]
MORE = "some of the changes are enough"

# Where nothing else is said, half of the tokens of the MLPs (and cross-attentions) are computed.
NEWTON, TAYLOR = {"basis": "newton", "order": 2}, {"basis": "taylor", "order": 2}
REUSED = {"modules": {"mlp": "reuse"}}

OTHERS: dict[str, tuple[str, Sections]] = {
    "tokens over a forecast": ("diffusers", {"forecast": NEWTON}),
    "tokens over a forecast, by the text": (
        "cross",
        {
            "forecast": TAYLOR,
            "modules": {"cross_attention": {"weight": 1.0}},
            "scores": {"cross_attention": 1.0, "staleness": 0.25},
            "guidance": {"layout": "batched", "selection": "shared"},
        },
    ),
    "tokens of an attention over a forecast": (
        "joint",
        {"forecast": TAYLOR, "modules": {"joint_attention": {"weight": 1.0}}},
    ),
    "forecasts of their own": (
        "cross",
        {
            "forecast": NEWTON,
            "modules": {"mlp": "reuse", "cross_attention": "reuse"},
            "rules": [
                {"match": "mlp", "forecast": {"basis": "hermite", "order": 1, "sigma": 0.4}},
                {"match": "cross_attention", "forecast": {"basis": "reuse", "order": None}},
                {"layers": 1, "match": "self_attention", "N": {"base": 2}},
            ],
        },
    ),
    "uneven steps": (
        "original",
        {**REUSED, "N": {"full_steps": [0, 1, 4, 6, 10]}, "forecast": {**NEWTON, "order": 3}},
    ),
    "a fit without a penalty": (
        "original",
        {**REUSED, "forecast": {"basis": "chebyshev", "order": 2, "ridge": 0}},
    ),
    "a table": (
        "original",
        {**REUSED, "forecast": {"basis": "table", "weights": [[1.5, -0.5], [2, -1.5, 0.5]]}},
    ),
    "timesteps, damped": (
        "original",
        {**REUSED, "forecast": {**NEWTON, "time": "timestep", "damping": 0.7}},
    ),
    "skips": ("diffusers", {"skip": "all", "forecast": NEWTON}),
    "skips of a list": ("cross", {**REUSED, "skip": [2, 5, 8], "N": {"base": 4}}),
    "skips and tokens take turns": (
        "diffusers",
        {"skip": "alternate", "forecast": TAYLOR, "N": {"base": 5}},
    ),
    "the state": ("diffusers", {"cache": {"grain": "model"}, "forecast": NEWTON}),
    "two states": ("joint", {"cache": {"grain": "model"}, "forecast": {**TAYLOR, "blend": 0.5}}),
    "the output": (
        "diffusers",
        {
            "cache": {"grain": "output"},
            "forecast": {**NEWTON, "blend": 0.3},
            "N": {"base": 2, "growth": 0.5, "first": 0.2, "last": 1},
        },
    ),
}


LONGER = ["tokens over a forecast", "skips and tokens take turns", "the output"]


@pytest.mark.parametrize(
    ("name", "steps"), [*((name, 12) for name in OTHERS), *((name, 20) for name in LONGER)]
)
def test_what_no_reference_policy_has(name: str, steps: int) -> None:
    kind, sections = OTHERS[name]
    subject, policy = small(kind), make_policy(**sections)
    assert_equal(subject, policy, subject.refer(policy, steps))


def changed(name: str, changes: Changes) -> Policy:
    """A reference policy with some of its numbers changed: "section.key"."""
    data = yaml.safe_load((POLICIES / f"{name}.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, _, own = key.partition(".")
        data[section][own] = value
    return load_policy(data)


@pytest.mark.parametrize(("name", "changes"), slow_but(DIT, [*DIT, *MORE_DIT], MORE), ids=str)
def test_policies_of_dit_and_what_is_near(name: str, changes: Changes) -> None:
    policy = changed(name, changes)
    assert_equal(dit(), policy, dit().refer(policy, 50))


@pytest.mark.parametrize(("name", "changes"), slow_but(FLUX, [*FLUX, *MORE_FLUX], MORE), ids=str)
def test_policies_of_flux_and_what_is_near(name: str, changes: Changes) -> None:
    policy, subject = changed(name, changes), flux()
    expected = []
    with torch.no_grad(), Hooks(subject.model, policy).installed() as hooks:
        for call, inputs in enumerate(subject.calls):
            hooks.now = Moment(call, float(inputs["timestep"][0]))
            expected.append(subject.model(**inputs)[0])
    assert_equal(subject, policy, expected)


@dataclass(frozen=True)
class Subject:
    """A model, captured, and the keyword arguments of each of its calls."""

    model: Any
    calls: Sequence[dict[str, Any]]

    @cached_property
    def captured(self) -> Captured:
        return Captured(self.model, self.calls)

    @cached_property
    def uncached(self) -> list[Tensor]:
        with torch.no_grad():
            return [self.model(**inputs)[0] for inputs in self.calls]

    def refer(self, policy: Policy, steps: int) -> list[Tensor]:
        """What the slow reference makes of the first calls."""
        reference = ReferenceSampler(self.model, policy, steps)
        with torch.no_grad():
            return [reference.step(*list(inputs.values())[:3]) for inputs in self.calls[:steps]]


def assert_equal(subject: Subject, policy: Policy, expected: Sequence[Tensor]) -> None:
    fast, steps = subject.captured.compile(policy), len(expected)
    with toca_fx.session(num_steps=steps) as run:
        outputs = [fast(inputs) for inputs in subject.captured.inputs[:steps]]
    far = 0.0
    for call, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        size = wanted.abs().max()
        assert (output - wanted).abs().max() <= TOLERANCE * size, f"call {call}"
        far = max(far, float((wanted - subject.uncached[call]).abs().max() / size))
    assert far > 1e-2, "or a backend that does nothing would pass"
    tuned = "was tuned for 12 steps and runs 20"
    assert not [each for each in run.report().warnings if tuned not in each]


@cache
def small(kind: str) -> Subject:
    """A tiny model; its latents are new at every call."""
    inputs = list(make_inputs(20, dtype=torch.float64))
    if kind in ("cross", "joint"):
        (_, _, text), *_ = text_inputs(1)
        inputs = [(x[:, :, :12], t, text) for x, t, _ in inputs]
    names = (
        ("x", "t", "y") if kind != "diffusers" else ("hidden_states", "timestep", "class_labels")
    )
    calls = [dict(zip(names, each, strict=True)) for each in inputs]
    return Subject(tiny(kind, layers=2).double(), calls)


@cache
def dit() -> Subject:
    names = ("hidden_states", "timestep", "class_labels")
    calls = [dict(zip(names, each, strict=True)) for each in make_inputs(50, dtype=torch.float64)]
    return Subject(tiny("diffusers", layers=2).double(), calls)


@cache
def flux() -> Subject:
    example = examples()["FluxTransformer2DModel"]
    model, inputs = build(example, dtype=torch.float64)
    return Subject(model, [vary(example, inputs, step, 50) for step in range(50)])
