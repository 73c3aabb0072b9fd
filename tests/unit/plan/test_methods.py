"""The reference policies of the methods after ToCa, call by call as their authors' code runs them.

The numbers are those of the authors' code on small models; the policies are tied to nothing else of
them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from toca_fx.plan.schedule import fresh_tokens, full_steps, skipped_steps
from toca_fx.policy import Policy, load_policy

TOTAL, LAYERS, TOKENS = 50, 28, 64


def calls(policy: Policy) -> list[int]:
    """The step index of each call."""
    indices = list(range(TOTAL))
    return indices if policy.sampler.order == "ascending" else indices[::-1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fora-dit", [0, *range(1, 50, 3)]),
        ("taylorseer-dit", [0, *range(1, 50, 4)]),
        ("taylorseer-flux", [0, 1, *range(2, 50, 5)]),
        ("hicache-flux", [0, 1, *range(2, 50, 5)]),
        ("spectrum-flux", [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46]),
        ("duca-dit", [0, 5, 9, 13, 19, 22, 25, 28, *range(31, 50, 2)]),
        ("duca-dit-vnorm", [0, 5, 9, 13, 19, 22, 25, 28, *range(31, 50, 2)]),
    ],
)
def test_full_calls_are_the_authors(name: str, expected: list[int]) -> None:
    policy = load_policy(f"reference/{name}")
    indices = calls(policy)
    full = full_steps(policy.N, indices, TOTAL)
    assert [call for call, s in enumerate(indices) if s in full] == expected


def test_the_model_runs_no_block_between_spectrums_full_steps() -> None:
    policy = load_policy("reference/spectrum-flux")
    skipped = skipped_steps(policy.N, policy.skip, policy.cache.grain, range(TOTAL), TOTAL)
    assert skipped == {*range(TOTAL)} - full_steps(policy.N, range(TOTAL), TOTAL)


DUCA = "FPSPPFPSPFPSPFPSPSPFSPFSPFSPFSPFPFPFPFPFPFPFPFPFPF"
"""Layers 1 to 27: full, token-wise or skipped. Layer 0 is full on calls 4 and 17 as well."""

DUCA_K = {
    0: [1, 2, 3, 4, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18],
    13: [1, 2, 4, 6, 7, 9, 11, 13, 14, 15, 16, 18, 19, 20, 21, 23],
    27: [1, 3, 4, 7, 9, 11, 14, 15, 17, 18, 20, 21, 23, 24, 26, 28],
}
"""By layer the numbers of fresh tokens, without the calls that compute none."""


@pytest.mark.parametrize("name", ["duca-dit", "duca-dit-vnorm"])
def test_duca_computes_the_tokens_of_its_authors(name: str) -> None:
    policy = load_policy(f"reference/{name}")
    indices = calls(policy)
    skipped = skipped_steps(policy.N, policy.skip, policy.cache.grain, indices, TOTAL)
    for layer in range(LAYERS):
        own = policy.for_site("mlp", f"transformer_blocks.{layer}.ff", layer)
        full = full_steps(own.N, indices, TOTAL)
        kinds = "".join("F" if s in full else "S" if s in skipped else "P" for s in indices)
        mixed = "".join("F" if call in (4, 17) else kind for call, kind in enumerate(DUCA))
        assert kinds == (DUCA if layer else mixed)
        wanted = [
            fresh_tokens(own, s, TOTAL, layer, LAYERS - 1, TOKENS)
            for s, kind in zip(indices, kinds, strict=True)
            if kind == "P"
        ]
        if layer in DUCA_K:
            assert [count for count in wanted if count] == DUCA_K[layer]


def as_duca_walks(base: int) -> list[str]:
    """By call the letters of three layers: each decides for itself, in their order, and the first
    that is full renews the interval at once.
    """
    found, interval = [], 0
    for call, s in enumerate(reversed(range(TOTAL))):
        letters = ""
        for _ in range(3):
            if call == 0 or s % interval == 0:
                letters += "F"
                interval = 2 if 10 <= s < 20 else round(base / (1.4 - 0.8 * s / TOTAL))
            else:
                letters += "P" if s % interval % 2 else "S"
        found.append(letters)
    return found


@pytest.mark.parametrize("base", range(2, 9))
@pytest.mark.parametrize("name", ["duca-dit", "duca-dit-vnorm"])
def test_duca_with_another_interval(name: str, base: int) -> None:
    """The file with another ``N.base`` is their code with another threshold."""
    policy = load_policy(f"reference/{name}")
    policy = replace(policy, N=replace(policy.N, base=base))
    indices = calls(policy)
    skipped = skipped_steps(policy.N, policy.skip, policy.cache.grain, indices, TOTAL)
    columns = []
    for layer in range(3):
        own = policy.for_site("mlp", f"transformer_blocks.{layer}.ff", layer)
        full = full_steps(own.N, indices, TOTAL)
        columns.append(["F" if s in full else "S" if s in skipped else "P" for s in indices])
        assert (own.scores.staleness_over or own.N.base) == base
    assert ["".join(letters) for letters in zip(*columns, strict=True)] == as_duca_walks(base)
