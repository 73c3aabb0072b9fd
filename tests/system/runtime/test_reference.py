"""End to end against the slow reference, in double precision: every kind of attention, score and
choice, at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import toca_fx
from tests.helpers import (
    AUTHORS,
    KINDS,
    Call,
    call,
    make_inputs,
    make_policy,
    picked_tokens,
    run_all,
    text_inputs,
    tiny,
)
from tests.marks import slow_but
from tests.reference import ReferenceSampler
from toca_fx.policy import Policy

pytestmark = pytest.mark.usefixtures("keep_memories")

TOLERANCE = 1e-10

Sections = Mapping[str, Any]

DIT: dict[str, Sections] = {
    "as the authors": AUTHORS,
    "count with drift, window, first and last": {
        "sampler": {"steps": 16},
        "N": {
            "base": 3,
            "drift": -0.4,
            "first": 2,
            "last": 1,
            "windows": [{"from": 0.5, "to": 0.75, "interval": 2}],
        },
    },
    "explicit steps": {"N": {"full_steps": [0, 4, 5, 9], "extra_full_steps": [7]}},
    "no token": {"R": {"base": 1.0}},
    "no token in the first half": {"R": {"base": 0.5, "step_weight": -2.0}},
    "all tokens": {"R": {"base": 0.0}},
    "one token": {"R": {"base": 0.98}},
    "value norm": {"scores": {"value_norm": 1.0}},
    "small values first, spread by a bonus": {
        "scores": {"small_values": 1.0, "staleness": 0.25},
        "spatial": {"bonus": 0.8, "grid": 2},
    },
    "key norm and influence": {
        "scores": {"key_norm": 0.5, "self_attention": 1.0, "staleness": 0.1}
    },
    "staleness alone": {"scores": {"staleness": 1.0}, "R": {"base": 0.7}},
    "shared selection": {
        "guidance": {"layout": "batched", "selection": "shared"},
        "spatial": {"bonus": 0.4, "grid": 2},
    },
    "spatial bonus in blocks of 4": {"spatial": {"bonus": 0.4, "grid": 4}, "R": {"base": 0.8}},
    "spatial bonus in blocks that do not fit": {
        "spatial": {"bonus": 0.4, "grid": 3},
        "R": {"base": 0.8},
    },
    "MLP reused": {"modules": {"mlp": "reuse"}},
    "attention computed": {"modules": {"self_attention": "compute"}},
    "MLP computed": {"modules": {"mlp": "compute"}},
    "layers apart": {
        "R": {"base": 0.7, "layer_weight": 0.6},
        "rules": [
            {
                "match": "mlp",
                "layers": "1-2",
                "R": {"base": 0.4},
                "scores": {"self_attention": 0.0, "value_norm": 1.0},
            },
            {"match": "mlp", "layers": 2, "module": "reuse"},
            {"match": "self_attention", "layers": 1, "module": "compute"},
            {"match": "self_attention", "layers": 0, "N": {"base": 6}},
        ],
    },
    "modules at different intervals": {
        "N": {"base": 4},
        "rules": [{"match": "mlp", "N": {"base": 3}}],
    },
    "attention partial at an interval of its own": {
        "modules": {"self_attention": {"weight": 0.6}},
        "scores": {"self_attention": 1.0, "key_norm": 0.5, "staleness": 0.25},
        "rules": [{"match": "self_attention", "N": {"base": 5}}],
    },
}

SHARED = {"layout": "batched", "selection": "shared"}
# Where nothing else is said, self-attention is reused, and cross-attention and MLP are partial, by
# the map of the one.
CROSS: dict[str, Sections] = {
    "as the authors": {
        "guidance": SHARED,
        "N": {"base": 3, "drift": -0.2},
        "R": {"base": 0.7, "step_weight": 0.9, "layer_weight": 0.6},
        "modules": {"cross_attention": {"weight": 0.6}, "mlp": {"weight": 1.6}},
        "spatial": {"bonus": 0.4, "grid": 4},
    },
    "separate selections": {
        "spatial": {"bonus": 0.4, "grid": 4},
        "R": {"base": 0.5, "step_weight": -2.0},
    },
    "cross-attention reused or computed": {
        "guidance": SHARED,
        "modules": {"cross_attention": "reuse"},
        "rules": [{"match": "cross_attention", "layers": 1, "module": "compute"}],
    },
    "cross-attention reused for twice the interval": {
        "modules": {"cross_attention": "reuse"},
        "rules": [
            {"match": "cross_attention", "N": {"base": 6}},
            {"match": "mlp", "spatial": {"bonus": 0.3, "grid": 3}},
        ],
    },
    "cross-attention full where the MLP is partial": {
        "rules": [{"match": "cross_attention", "N": {"base": 2}}]
    },
    "every module partial": {
        "modules": {
            "self_attention": {"weight": 1.2},
            "cross_attention": {"weight": 0.6},
            "mlp": {"weight": 0.8},
        }
    },
    "every module partial, by both maps": {
        "guidance": SHARED,
        "modules": {"self_attention": {"weight": 0.5}},
        "scores": {"self_attention": 0.6, "cross_attention": 0.8, "staleness": 0.1},
        "spatial": {"bonus": 0.4},
        "rules": [{"layers": 1, "scores": {"cross_attention": 0.0}}],
    },
}

OF_TEXT, OF_IMAGE = {"path": "*.text.*"}, {"path": "*.image.*"}
PARTIAL = {"joint_attention": {"weight": 1.0}}
# Where nothing else is said, joint attention is reused, and both MLPs are partial.
JOINT: dict[str, Sections] = {
    "as the authors": {
        "N": {"base": 4, "first": 3},
        "R": {"base": 0.5, "layer_weight": 0.5, "layer_span": 27},
    },
    "streams apart": {
        "rules": [
            {**OF_TEXT, "N": {"base": 2}, "R": {"base": 0.8}},
            {**OF_IMAGE, "spatial": {"bonus": 0.4, "grid": 4}},
        ]
    },
    "attention partial": {"guidance": SHARED, "modules": PARTIAL, "R": {"base": 0.8}},
    "streams at different intervals": {
        "modules": PARTIAL,
        "rules": [{**OF_TEXT, "N": {"base": 2}}],
    },
    "attention partial at an interval of its own": {
        "modules": PARTIAL,
        "scores": {"value_norm": 1.0, "key_norm": 0.5, "staleness": 0.25},
        "rules": [{"match": "joint_attention", "N": {"base": 5}}],
    },
    "attention partial for the image, reused for the text": {
        "rules": [{**OF_IMAGE, "match": "joint_attention", "module": {"weight": 0.8}}]
    },
    "attention computed for one stream": {
        "modules": PARTIAL,
        "rules": [
            {**OF_TEXT, "match": "joint_attention", "layers": 0, "module": "compute"},
            {**OF_TEXT, "match": "joint_attention", "layers": 1, "module": "reuse"},
            {**OF_IMAGE, "match": "joint_attention", "layers": 1, "module": "compute"},
        ],
    },
}

POLICIES = {"diffusers": DIT, "original": DIT, "cross": CROSS, "joint": JOINT}
CASES = [(kind, name) for kind, policies in POLICIES.items() for name in policies]


def policy_of(kind: str, name: str) -> Policy:
    sections = POLICIES[kind][name]
    if kind == "cross":
        modules = {"cross_attention": {"weight": 1.0}, **sections.get("modules", {})}
        sections = {
            "scores": {"cross_attention": 1.0, "staleness": 0.25},
            **sections,
            "modules": modules,
        }
    return make_policy(**sections)


def generation(kind: str, steps: int) -> tuple[Any, list[Call]]:
    """A tiny model in float64 and its inputs, new at every step: four samples, or two with guidance
    in one batch.
    """
    if kind in KINDS:
        return tiny(kind).double(), list(make_inputs(steps, batch=4, dtype=torch.float64))
    return tiny(kind, layers=2).double(), text_inputs(steps, batch=4)


OFTEN = [
    *((kind, "as the authors") for kind in POLICIES),
    ("diffusers", "layers apart"),
    ("diffusers", "shared selection"),
    ("diffusers", "attention partial at an interval of its own"),
    ("cross", "every module partial, by both maps"),
    ("joint", "streams at different intervals"),
]


@pytest.mark.parametrize(
    ("kind", "name"), slow_but(OFTEN, CASES, "of the policies, these hold what differs most")
)
def test_equals_the_reference_at_every_step(kind: str, name: str) -> None:
    policy = policy_of(kind, name)
    steps = policy.sampler.steps
    assert steps >= 12
    model, inputs = generation(kind, steps)
    reference = ReferenceSampler(model, policy)
    fast = toca_fx.compile(model, policy, inner="eager")
    far = 0.0
    with torch.no_grad(), toca_fx.session(num_steps=steps) as run:
        for number, (step, uncached) in enumerate(zip(inputs, run_all(model, inputs), strict=True)):
            expected = reference.step(*step)
            assert (call(fast, *step) - expected).abs().max() <= TOLERANCE, f"call {number}"
            far = max(far, (expected - uncached).abs().max().item())
            # Sites that never have a fresh token are reused.
            ours = {path: tokens for path, tokens in picked_tokens(run).items() if tokens[0]}
            theirs = {
                path: [sorted(row) for row in tokens]
                for path, tokens in reference.chosen[-1].items()
                if tokens[0]
            }
            assert ours == theirs, f"call {number}"
    assert far > 1e-2, "or a backend that does nothing would pass"
    assert not [each for each in run.report().warnings if "new tensors at every call" not in each]


@pytest.mark.parametrize("kind", POLICIES)
def test_the_reference_without_caching_is_the_model(kind: str) -> None:
    model, inputs = generation(kind, 3)
    sampler = ReferenceSampler(model, make_policy(N={"base": 1}, sampler={"steps": 3}))
    with torch.no_grad():
        for step, expected in zip(inputs, run_all(model, inputs), strict=True):
            assert (sampler.step(*step) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_random_scores_follow_the_choice_that_was_made(kind: str) -> None:
    policy = make_policy(scores={"random": 1.0, "staleness": 0.25}, R={"base": 0.75})
    model, inputs = generation(kind, 12)
    fast = toca_fx.compile(model, policy, inner="eager")
    outputs, chosen = [], []
    with toca_fx.session() as run:
        for step in inputs:
            outputs += run_all(fast, [step])
            chosen.append(picked_tokens(run))
    partial = [step for step in chosen if step]
    assert len(partial) == 8
    assert all(
        len(set(map(tuple, (tokens[0] for tokens in step.values())))) > 1 for step in partial
    )
    reference = ReferenceSampler(model, policy, choices=chosen)
    with torch.no_grad():
        for number, (step, output) in enumerate(zip(inputs, outputs, strict=True)):
            assert (reference.step(*step) - output).abs().max() <= TOLERANCE, f"call {number}"
