"""Policies written to files: what is read again is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from toca_fx.policy import Policy, load_policy, shipped_policies, validate_file
from toca_fx.policy.dump import to_mapping

VALID = sorted((Path(__file__).resolve().parents[2] / "policies" / "valid").glob("*.yaml"))


def bare(policy: Policy) -> Policy:
    """Without what tells where it stands."""
    rules = tuple(replace(rule, position="") for rule in policy.rules)
    return replace(policy, source="", rules=rules)


@pytest.mark.parametrize("name", [*shipped_policies(), *map(str, VALID)])
def test_what_is_read_again_is_the_same(name: str, tmp_path: Path) -> None:
    policy = load_policy(name)
    assert bare(load_policy(to_mapping(policy))) == bare(policy)
    file = tmp_path / "again.yaml"
    file.write_text(policy.to_yaml(), encoding="utf-8")
    assert bare(load_policy(file)) == bare(policy)
    assert validate_file(file) == ()


def test_defaults_are_left_out() -> None:
    given = {"version": 1, "name": "small", "sampler": {"steps": 9}, "N": {"base": 3}}
    assert to_mapping(load_policy(given)) == given


def test_a_section_that_a_rule_switches_off() -> None:
    given = {
        "version": 1,
        "name": "small",
        "sampler": {"steps": 9},
        "N": {"full_steps": {"of": 9, "at": [0, 4]}},
        "R": {"base": 0.5},
        "scores": {"random": 1.0},
        "spatial": {"bonus": 0.5},
        "rules": [
            {"match": "mlp", "layers": "0-3", "spatial": "off", "R": {"base": 0.9}},
            {"layers": 5, "module": "compute"},
        ],
    }
    policy = load_policy(given)
    assert to_mapping(policy) == given
    assert yaml.safe_load(policy.to_yaml()) == given
