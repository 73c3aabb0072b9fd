"""Policies: the shipped ones, loading, rules for one site, and every problem with its position."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from toca_fx.diagnostics import PolicyError, Problem, UnreadablePolicyError
from toca_fx.policy import (
    MODULE_TYPES,
    Action,
    Forecast,
    Guidance,
    Interval,
    Placement,
    Ratio,
    Rule,
    Sampler,
    Scores,
    Spatial,
    load_policy,
    shipped_policies,
    validate_file,
)
from toca_fx.policy.keys import keys_of
from toca_fx.policy.schema import policy_schema

ROOT = Path(__file__).resolve().parents[3]

POLICIES = ROOT / "tests" / "policies"

VALID = sorted((POLICIES / "valid").glob("*.yaml"))

SMALLEST: dict[str, Any] = {
    "version": 1,
    "name": "x",
    "sampler": {"steps": 20},
    "N": {"base": 3},
    "R": {"base": 1},
}


def messages(error: pytest.ExceptionInfo[PolicyError]) -> list[str]:
    return [str(problem) for problem in error.value.problems]


# Loading


def test_policies_are_hashable_and_pass_through() -> None:
    policy = load_policy("dit-xl-2")
    assert load_policy(policy) is policy
    assert hash(policy) == hash(load_policy("dit-xl-2"))
    assert len({load_policy(file) for file in VALID}) == len(VALID)


def test_load_from_path_and_text_path() -> None:
    file = ROOT / "policies" / "default-image.yaml"
    assert load_policy(file) == load_policy(str(file))


def test_defaults() -> None:
    policy = load_policy(SMALLEST)
    assert (policy.N, policy.R, policy.scores, policy.spatial) == (
        Interval(3),
        Ratio(1.0),
        Scores(),
        None,
    )
    assert dict(policy.modules) == {
        kind: Action("partial" if kind == "mlp" else "reuse") for kind in MODULE_TYPES
    }
    assert (policy.sampler, policy.guidance, policy.seed, policy.rules) == (
        Sampler(20),
        Guidance(),
        0,
        (),
    )
    assert policy.source == "<mapping>"


@pytest.mark.parametrize("kind", MODULE_TYPES)
def test_every_type_of_module_can_be_reused_computed_or_select_tokens(kind: str) -> None:
    actions = {
        "reuse": Action("reuse"),
        "compute": Action("compute"),
        "partial": Action("partial", 0.6),
    }
    for given, action in zip(("reuse", "compute", {"weight": 0.6}), actions.values(), strict=True):
        assert dict(load_policy({**SMALLEST, "modules": {kind: given}}).modules)[kind] == action
    for rule in ({"match": kind}, {"path": "*.attn"}, {"layers": 3}):
        policy = load_policy({**SMALLEST, "rules": [{**rule, "module": {"weight": 0.6}}]})
        assert policy.for_site(kind, "blocks.3.attn", 3).action == actions["partial"]


FORECAST_KEYS = tuple(declared.name for declared in keys_of(Forecast))


def test_null_is_the_default_of_each_key_of_a_forecast() -> None:
    nothing = dict.fromkeys(FORECAST_KEYS)
    assert load_policy({**SMALLEST, "forecast": nothing}).forecast == Forecast()
    given = {"basis": "newton", "order": 2, "blend": 0.5}
    rules = [{"layers": "0-1", "forecast": nothing}, {"layers": 1, "forecast": {"blend": None}}]
    policy = load_policy({**SMALLEST, "forecast": given, "rules": rules[:1]})
    assert policy.for_site("mlp", "blocks.0.ff", 0).forecast == Forecast()
    policy = load_policy({**SMALLEST, "forecast": given, "rules": rules[1:]})
    assert policy.for_site("mlp", "blocks.1.ff", 1).forecast == Forecast("newton", 2)
    assert policy.for_site("mlp", "blocks.2.ff", 2).forecast == Forecast("newton", 2, blend=0.5)


@pytest.mark.parametrize(("section", "key"), [("N", "base"), ("R", "base"), ("cache", "dtype")])
def test_elsewhere_null_is_no_value(section: str, key: str) -> None:
    with pytest.raises(PolicyError, match=rf"{section}\.{key}: expected .*, got nothing"):
        load_policy({**SMALLEST, section: {key: None}})


def test_weights_of_a_table_are_numbers_in_tuples() -> None:
    forecast = {"basis": "table", "weights": [[2, -1], [3, -2.0, 0.5]]}
    assert load_policy({**SMALLEST, "forecast": forecast}).forecast == Forecast(
        "table", weights=((2.0, -1.0), (3.0, -2.0, 0.5))
    )
    assert load_policy(SMALLEST).sampler.noise is None
    sampler = {"steps": 20, "noise": "cosine"}
    assert load_policy({**SMALLEST, "sampler": sampler}).sampler == Sampler(20, noise="cosine")


def test_whole_numbers_become_the_declared_types() -> None:
    policy = load_policy({**SMALLEST, "sampler": {"steps": 20.0}, "spatial": {"bonus": 1}})
    assert isinstance(policy.sampler.steps, int)
    assert isinstance(policy.R.base, float)
    assert policy.spatial == Spatial(1.0, 2)
    assert isinstance(policy.spatial.bonus, float)


def test_mean_interval_of_a_step_list_is_the_base() -> None:
    assert (
        Interval(3, full_steps=(0, 6, 9, 12, 15, 18))
        == load_policy(POLICIES / "valid" / "step-list.yaml").N
    )


def full_steps(value: object) -> Interval:
    return load_policy({**SMALLEST, "N": {"full_steps": value}}).N


def test_full_steps_are_indices_places_or_placed_for_a_number_of_steps() -> None:
    indices, places = full_steps([0, 5.0, 10]), full_steps([0, 0.25, 0.5, 0.75])
    placed = full_steps({"of": 50, "at": [0.0, 10, 20, 30]})
    assert indices == Interval(7, full_steps=(0, 5, 10))
    assert places == Interval(5, full_steps=(0, 0.25, 0.5, 0.75))
    assert placed == Interval(12, full_steps=Placement(50, (0, 10, 20, 30)))
    assert [each.by_index for each in (indices, places, placed)] == [True, False, False]
    assert Interval(extra_full_steps=(3,)).by_index
    assert not Interval().by_index
    for value in (indices.full_steps, placed.full_steps.at):
        assert all(isinstance(step, int) for step in value)


def test_first_and_last_are_numbers_or_shares() -> None:
    interval = load_policy({**SMALLEST, "N": {"base": 3, "first": 3.0, "last": 0.1}}).N
    assert (interval.first, interval.last) == (3, 0.1)
    assert isinstance(interval.first, int)
    assert [interval.ends(total) for total in (4, 5, 15, 20, 100)] == [
        (3, 0),
        (3, 0),
        (3, 2),
        (3, 2),
        (3, 10),
    ]
    shares = Interval(first=0.2, last=0.0)
    assert [shares.ends(total)[0] for total in (1, 5, 6, 50)] == [1, 1, 2, 10]


def test_skips_are_a_word_or_a_list_of_steps() -> None:
    assert load_policy(SMALLEST).skip == "none"
    assert load_policy({**SMALLEST, "skip": "alternate"}).skip == "alternate"
    skip = load_policy({**SMALLEST, "skip": [1.0, 3]}).skip
    assert skip == (1, 3)
    assert all(isinstance(step, int) for step in skip)


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(PolicyError) as error:
        load_policy("dit-xl2")
    [message] = messages(error)
    assert message.startswith(
        "dit-xl2: there is no shipped policy and no file of this name; did you mean `dit-xl-2`?"
    )
    assert message.endswith(f"(shipped: {', '.join(shipped_policies())})")


def test_missing_file_is_unreadable() -> None:
    with pytest.raises(UnreadablePolicyError, match=r"nowhere\.yaml: cannot be read: no such file"):
        load_policy("nowhere.yaml")


def test_problems_of_a_mapping_name_the_key_path() -> None:
    rules = [{"match": "mlp", "R": {"base": 2}}, {"layers": "3-1", "R": {"base": 0.5}}]
    with pytest.raises(PolicyError) as error:
        load_policy({**SMALLEST, "R": {"base": 1.5}, "guidence": {}, "rules": rules})
    assert set(messages(error)) == {
        "R.base: `base` must be between 0 and 1, got `1.5`",
        "guidence: unknown key `guidence`; did you mean `guidance`?",
        "rules[0].R.base: `base` must be between 0 and 1, got `2`",
        "rules[1].layers: the range 3-1 holds no layer; did you mean 1-3?",
    }


def test_mappings_that_yaml_cannot_hold() -> None:
    endless: dict[str, Any] = dict(SMALLEST)
    endless["R"] = endless
    for value in (float("nan"), float("-inf"), 10**5000, object(), {1, 2}, b"3"):
        with pytest.raises(PolicyError, match=r"R.base: "):
            load_policy({**SMALLEST, "R": {"base": value}})
    with pytest.raises(PolicyError, match="nested more than 16 levels deep"):
        load_policy(endless)


def test_warnings_are_logged_and_do_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    file = POLICIES / "warnings" / "nothing-to-choose-by.yaml"
    with caplog.at_level(logging.WARNING):
        load_policy(file)
    assert [record.getMessage() for record in caplog.records] == [
        str(problem) for problem in validate_file(file)
    ]


# Rules


def test_rules_are_merged_key_by_key_and_later_rules_win() -> None:
    policy = load_policy(
        {
            **SMALLEST,
            "R": {"base": 0.9, "step_weight": 0.5},
            "scores": {"staleness": 0.25},
            "spatial": {"bonus": 0.6},
            "rules": [
                {
                    "match": "mlp",
                    "path": "*.single_*",
                    "layers": "0-3",
                    "R": {"base": 0.8},
                    "spatial": {"grid": 4},
                },
                {"layers": 2, "R": {"base": 0.7}, "N": {"base": 2}},
                {"match": "mlp", "layers": "3", "module": "compute", "spatial": "off"},
            ],
        }
    )
    path = "transformer.single_blocks.1"
    assert Ratio(0.8, 0.5) == policy.for_site("mlp", path, 1).R
    assert policy.for_site("mlp", path, 1).spatial == Spatial(0.6, 4)
    assert Ratio(0.7, 0.5) == policy.for_site("mlp", path, 2).R
    assert Interval(2) == policy.for_site("mlp", path, 2).N
    assert Ratio(0.7, 0.5) == policy.for_site("mlp", "blocks.2", 2).R
    assert (policy.for_site("mlp", path, 3).action, policy.for_site("mlp", path, 3).spatial) == (
        Action("compute"),
        None,
    )


def test_a_share_of_the_queries_stands_for_an_odd_number() -> None:
    shares = {1: 1, 0.7: 1, 0.5: 3, 1 / 3: 3, 0.25: 5, 0.2: 5, 0.125: 9, 0.001: 1001}
    rules = [{"layers": 1, "scores": {"queries": 0.1}}]
    for share, every in shares.items():
        policy = load_policy(
            {**SMALLEST, "scores": {"self_attention": 1.0, "queries": share}, "rules": rules}
        )
        assert (policy.scores.every, policy.for_site("mlp", "blocks.1", 1).scores.every) == (
            every,
            11,
        )


def test_a_rule_without_a_layer_number_matches_no_range() -> None:
    rule = Rule("mlp", "*.ff", (0, 3), (), "rules[0]")
    assert rule.applies("mlp", "blocks.0.ff", 0)
    assert rule.applies("mlp", "blocks.3.ff", 3)
    assert not rule.applies("mlp", "blocks.4.ff", 4)
    assert not rule.applies("mlp", "blocks.0.ff", None)
    assert not rule.applies("mlp", "blocks.0.FF", 0)
    assert not rule.applies("self_attention", "blocks.0.ff", 0)


def test_rules_know_where_they_stand() -> None:
    file = POLICIES / "valid" / "everything.yaml"
    first = load_policy(file).rules[0]
    assert first.position == f"{file}:27:5"
    assert Problem.at(first.position, "here") == Problem(str(file), 27, 5, "here")
    assert str(Problem.at("rules[0]", "here", "warning")) == "rules[0]: warning: here"


# Schema and reference


def schema_nodes(schema: object) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for key, value in schema.items():
            if key not in ("examples", "default"):
                yield from schema_nodes(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from schema_nodes(value)


def test_schema_is_valid_strict_and_described() -> None:
    schema = policy_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    for node in schema_nodes(schema):
        if isinstance(node.get("properties"), dict) and "type" in node:
            assert node["additionalProperties"] is False
            for name, value in node["properties"].items():
                assert value.get("description"), name


def test_defaults_and_examples_of_the_schema_fit_it() -> None:
    schema = policy_schema()
    for node in schema_nodes(schema):
        values = [*node.get("examples", ()), *([node["default"]] if "default" in node else [])]
        if isinstance(node.get("description"), str):
            for value in values:
                jsonschema.Draft7Validator({**node, "definitions": schema["definitions"]}).validate(
                    value
                )


def test_schema_and_reference_are_current_and_check_notices_when_they_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = ROOT / "tools" / "policy_reference.py"
    result = subprocess.run(
        [sys.executable, str(tool), "--check"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    monkeypatch.syspath_prepend(str(tool.parent))
    import policy_reference

    for name in (policy_reference.SCHEMA, policy_reference.README):
        stale = tmp_path / name
        stale.parent.mkdir()
        stale.write_text("stale", encoding="utf-8")
    (tmp_path / "policies" / policy_reference.EXAMPLE).write_text("version: 1\n", encoding="utf-8")
    assert policy_reference.main(["--check"], tmp_path) == 1
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [
        policy_reference.SCHEMA,
        policy_reference.README,
    ]
    assert policy_reference.main([], tmp_path) == 0
    assert policy_reference.main(["--check"], tmp_path) == 0
