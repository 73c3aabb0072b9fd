"""Policies: the shipped ones, loading, rules for one site, and every problem with its position."""

from __future__ import annotations

import dataclasses
import logging
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from toca_fx.diagnostics import PolicyError, Problem, UnreadablePolicyError, nearest
from toca_fx.policy import (
    MODULE_TYPES,
    Action,
    Guidance,
    Interval,
    Ratio,
    Rule,
    Sampler,
    Scores,
    Spatial,
    Window,
    load_policy,
    shipped_policies,
    validate_file,
)
from toca_fx.policy.parse import parse_text
from toca_fx.policy.scalar import read_plain
from toca_fx.policy.schema import policy_schema

ROOT = Path(__file__).resolve().parents[3]
POLICIES = ROOT / "tests" / "policies"
VALID = sorted((POLICIES / "valid").glob("*.yaml"))
FAULTY = sorted([*(POLICIES / "invalid").glob("*.yaml"), *(POLICIES / "warnings").glob("*.yaml")])

SMALLEST: dict[str, Any] = {
    "version": 1,
    "name": "x",
    "sampler": {"steps": 20},
    "N": {"base": 3},
    "R": {"base": 1},
}


def messages(error: pytest.ExceptionInfo[PolicyError]) -> list[str]:
    return [str(problem) for problem in error.value.problems]


# The shipped policies


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policies_are_clean_and_carry_their_name(name: str) -> None:
    assert validate_file(shipped_policies()[name]) == ()
    assert load_policy(name).name == name


def test_every_shipped_policy_opens_with_a_modeline_that_points_to_the_schema() -> None:
    for file in shipped_policies().values():
        modeline = file.read_text(encoding="utf-8").splitlines()[0]
        assert modeline.startswith("# yaml-language-server: $schema=")
        assert (
            file.parent / modeline.partition("=")[2]
        ).resolve() == ROOT / "toca_fx" / "policy.schema.json"


def test_shipped_policies_are_these() -> None:
    recommended = {
        "default-image",
        "default-video",
        "digits",
        "dit-xl-2",
        "flux-dev",
        "opensora",
        "pixart-alpha",
    }
    dit, flux = (
        ("dit-xl-2-ddim50", "dit-xl-2-ddpm250"),
        ("flux-dev-n4", "flux-dev-n5", "flux-dev-n6"),
    )
    assert shipped_policies().keys() == recommended | {
        f"reference/{name}" for name in (*dit, *flux, "opensora", "pixart-alpha")
    }


def test_one_recommended_policy_per_model_class_and_none_for_the_defaults() -> None:
    classes = [
        name
        for policy in map(load_policy, shipped_policies())
        if "/" not in policy.name
        for name in policy.model
    ]
    assert sorted(classes) == [
        "DiTTransformer2DModel",
        "FluxTransformer2DModel",
        "PixArtTransformer2DModel",
        "STDiT3",
    ]


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policies_fit_on_one_screen(name: str) -> None:
    lines = shipped_policies()[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize(
    ("name", "steps", "base", "step_weight", "layer_weight", "mixed"),
    [("ddim50", 50, 3, 2.0, -0.2, (45, 32)), ("ddpm250", 250, 4, 0.4, 0.8, (245, 155))],
)
def test_reference_policies_of_dit_hold_the_authors_numbers(
    name: str,
    steps: int,
    base: int,
    step_weight: float,
    layer_weight: float,
    mixed: tuple[int, ...],
) -> None:
    policy = load_policy(f"reference/dit-xl-2-{name}")
    assert policy.sampler == Sampler(steps, "descending")
    assert policy.guidance == Guidance("batched", "independent")
    window = Window(0.2, 0.4, 2)
    assert Interval(base, drift=0.4, first=1, last=0, phase="modulo", windows=(window,)) == policy.N
    assert Ratio(0.93, step_weight, layer_weight, layer_span=27) == policy.R
    assert dict(policy.modules)["mlp"] == Action("partial", 2.5)
    assert dict(policy.modules)["self_attention"] == Action("reuse")
    assert policy.scores == Scores(self_attention=1.0, staleness=0.25, staleness_over=base)
    assert policy.spatial == Spatial(0.6, 2)
    first, second = (
        policy.for_site("mlp", f"transformer_blocks.{layer}.ff", layer) for layer in (0, 1)
    )
    assert first.N.extra_full_steps == mixed
    assert second.N == policy.N
    assert (first.R, first.action, first.scores, first.spatial) == (
        second.R,
        second.action,
        second.scores,
        second.spatial,
    )


def test_reference_policy_of_pixart_holds_the_authors_numbers() -> None:
    policy = load_policy("reference/pixart-alpha")
    assert (policy.sampler, policy.guidance) == (Sampler(20), Guidance("batched", "shared"))
    assert Interval(3, drift=-0.2, phase="modulo") == policy.N
    assert Ratio(0.7, 0.9, 0.6, layer_span=27) == policy.R
    actions = {
        "self_attention": Action("reuse"),
        "cross_attention": Action("partial", 0.6),
        "mlp": Action("partial", 1.6),
    }
    assert {**dict(policy.modules), **actions} == dict(policy.modules)
    assert policy.scores == Scores(cross_attention=1.0, staleness=0.25, staleness_over=3)
    assert policy.spatial == Spatial(0.4, 4)
    assert [policy.for_site(kind, "x", 0).N.extra_full_steps for kind in actions] == [(4,)] * 3
    assert policy.for_site("mlp", "x", 1).N == policy.N


def test_reference_policy_of_opensora_holds_the_authors_numbers() -> None:
    policy = load_policy("reference/opensora")
    assert (policy.sampler, policy.guidance) == (Sampler(30), Guidance("batched", "shared"))
    intervals = [
        policy.for_site(kind, "x", 0).N for kind in ("self_attention", "cross_attention", "mlp")
    ]
    assert intervals == [Interval(base, first=3, phase="modulo") for base in (3, 6, 3)]
    actions = [
        policy.for_site(kind, "x", 0).action
        for kind in ("self_attention", "cross_attention", "mlp")
    ]
    assert actions == [Action("reuse"), Action("reuse"), Action("partial", 1.495)]
    assert (policy.R, policy.spatial) == (Ratio(0.9), None)
    assert policy.scores == Scores(cross_attention=1.0, staleness=0.25, staleness_over=3)


@pytest.mark.parametrize("base", [4, 5, 6])
def test_reference_policies_of_flux_hold_the_authors_numbers(base: int) -> None:
    policy = load_policy(f"reference/flux-dev-n{base}")
    assert (policy.sampler, policy.guidance) == (Sampler(50), Guidance())
    assert Interval(base, first=3) == policy.N
    assert (policy.R, policy.spatial) == (Ratio(0.9, layer_weight=0.5, layer_span=27), None)
    assert policy.scores == Scores(self_attention=1.0, staleness=0.25, staleness_over=base)
    assert policy.for_site("joint_attention", "transformer_blocks.0.attn", 0).action == Action(
        "reuse"
    )
    assert policy.for_site(
        "self_attention", "single_transformer_blocks.0.attn", 0
    ).action == Action("reuse")
    weights = {
        "transformer_blocks.0.ff": 0.4,
        "transformer_blocks.0.ff_context": 0.4,
        "single_transformer_blocks.0": 1.6,
    }
    assert {path: policy.for_site("mlp", path, 0).action.weight for path in weights} == weights


@pytest.mark.parametrize(
    ("name", "reference"),
    [("pixart-alpha", "pixart-alpha"), ("opensora", "opensora"), ("flux-dev", "flux-dev-n4")],
)
def test_recommended_policies_have_the_numbers_of_the_reference_and_count(
    name: str, reference: str
) -> None:
    ours, theirs = load_policy(name), load_policy(f"reference/{reference}")
    assert (ours.sampler, ours.guidance, ours.modules, ours.spatial) == (
        theirs.sampler,
        theirs.guidance,
        theirs.modules,
        theirs.spatial,
    )
    assert ours.N.phase == "count"
    assert dataclasses.replace(ours.N, phase=theirs.N.phase) == theirs.N
    assert dataclasses.replace(ours.R, layer_span=theirs.R.layer_span) == theirs.R
    assert (
        dataclasses.replace(ours.scores, staleness_over=ours.N.base, queries=1.0) == theirs.scores
    )
    assert not any(key == "N.extra_full_steps" for rule in ours.rules for key, _ in rule.overrides)


def test_recommended_policy_of_dit_mirrors_the_reference() -> None:
    ours, theirs = load_policy("dit-xl-2"), load_policy("reference/dit-xl-2-ddim50")
    assert (ours.sampler.order, ours.N.phase, ours.rules) == ("ascending", "count", ())
    assert (ours.N.base, ours.N.drift) == (theirs.N.base, -theirs.N.drift)
    assert (ours.R.base, ours.R.step_weight) == (theirs.R.base, -theirs.R.step_weight)
    [window], [their_window] = ours.N.windows, theirs.N.windows
    assert (window.start, window.stop) == pytest.approx(
        (1 - their_window.stop, 1 - their_window.start)
    )


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
    assert first.position == f"{file}:25:5"
    assert Problem.at(first.position, "here") == Problem(str(file), 25, 5, "here")
    assert str(Problem.at("rules[0]", "here", "warning")) == "rules[0]: warning: here"


# Problems and their positions


@pytest.mark.parametrize("file", FAULTY, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_problems_are_the_expected_ones(file: Path) -> None:
    found = [str(problem).replace(str(file), file.name, 1) for problem in validate_file(file)]
    assert found == file.with_suffix(".expected").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("file", VALID, ids=lambda file: file.stem)
def test_valid_files_are_clean(file: Path) -> None:
    assert validate_file(file) == ()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("0.5", 0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1.0e-3", 0.001),
        ("true", True),
        ("~", None),
        ("", None),
    ]
    + [(word, word) for word in ("0-3", "y", "1.2.3", "off-axis", "2024-01-01", "nan", "e5")],
)
def test_plain_words(text: str, value: object) -> None:
    assert read_plain(text) == (value, None)


@pytest.mark.parametrize(
    "text",
    [
        "1e-3",
        "1E5",
        "on",
        "No",
        "YES",
        "010",
        "-007",
        "0x1F",
        "0b1",
        "0o7",
        "1_000",
        "1:30",
        ".inf",
        "-.INF",
        ".NaN",
    ],
)
def test_words_that_are_traps(text: str) -> None:
    complaint = read_plain(text).complaint
    assert complaint
    assert f"`{text}`" in complaint


def test_nearest() -> None:
    assert nearest("drif", ["base", "drift"]) == "drift"
    assert nearest("zzz", ["base", "drift"]) is None
    assert nearest("drift" * 100_000, ["base", "drift"]) is None


def hostile_texts() -> Iterator[tuple[str, str]]:
    yield "flow depth", "[" * 50_000
    yield "mapping depth", "{a: " * 30_000
    yield "key depth", "? " * 50_000
    yield "sequence depth", "- " * 60_000
    yield "aliases", "a: &a [x]\nb: [" + "*a, " * 30_000 + "]"
    yield "anchors", "".join(f"a{i}: &a{i} [" + f"*a{i - 1}," * 9 + "]\n" for i in range(1, 900))
    yield "keys", "".join(f"key{i}: 1\n" for i in range(10_000))
    yield "duplicates", "N: {base: 1}\n" * 8_000
    yield "one long word", "name: " + "a" * 120_000
    yield "one long key", "a" * 120_000 + ": 1"
    yield "digits", "seed: " + "9" * 120_000
    yield "colons", "seed: 1" + ":1" * 50_000
    yield "exponents", "seed: 1e" + "9" * 30
    yield (
        "stars",
        "version: 1\nname: x\nsampler: {steps: 5}\nN: {base: 3}\nR: {base: 1}\nrules: [{path: '"
        + "*a" * 90
        + "', R: {base: 0}}]",
    )
    yield (
        "rules",
        "rules:\n" + "".join(f"- {{layers: {i}, R: {{base: 0.5}}}}\n" for i in range(480)),
    )
    yield (
        "different rules",
        "rules:\n"
        + "".join(f"- {{path: '*a{i}*b*', match: mlp, R: {{base: 0.5}}}}\n" for i in range(390)),
    )
    yield "steps", "N: {full_steps: [" + "1, x, " * 900 + "]}"
    yield "windows", "N: {windows: [" + "{from: 0.1, to: 0.2, interval: 2}, " * 400 + "]}"
    yield "yaml version", "%YAML " + "9" * 6000 + ".1\n--- a"
    yield "quotes", '"' * 120_000
    yield "block scalar", "name: |99999999999\n x"
    yield "comments", "#\n" * 60_000


@pytest.mark.parametrize(
    ("name", "text"), list(hostile_texts()), ids=lambda value: value if len(value) < 20 else ""
)
def test_hostile_files_end_in_problems_and_soon(name: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "hostile.yaml"
    file.write_text(text, encoding="utf-8")
    start = time.process_time()
    problems = validate_file(file)
    assert time.process_time() - start < 2
    assert name == "stars" or any(problem.severity == "error" for problem in problems)
    assert all(len(problem.message) < 400 and "\n" not in problem.message for problem in problems)


def mutate(text: str, chance: random.Random) -> str:
    """One to five small damages."""
    snippets = [
        "\t",
        " ",
        ":",
        "-",
        "[",
        "}",
        "{",
        ",",
        "&a ",
        "*a",
        "!!x ",
        "'",
        '"',
        "\n",
        "#",
        "|",
        ">",
        "<<",
        "~",
        "1e3",
        "off",
    ]
    snippets += [
        "9" * 50,
        ".nan",
        "\ud7ff",
        "\x85",
        "\u2028",
        "%",
        "@",
        "`",
        "? ",
        "null",
        "[]",
        "{}",
        "-1",
        "0.5",
        "true",
        "\\",
        "---\n",
    ]
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(len(text) + 1)
        length = chance.choice((0, 0, 1, 3, 20))
        lines = text.splitlines(keepends=True)
        kind = chance.randrange(4)
        if kind == 0:
            text = text[:at] + chance.choice(snippets) + text[at + length :]
        elif kind == 1:
            text = text[:at] + text[at + length :]
        elif kind == 2 and lines:
            lines.insert(chance.randrange(len(lines)), chance.choice(lines))
            text = "".join(lines)
        else:
            text = text.replace(
                chance.choice("0123456789:,{}"), chance.choice(snippets), chance.randint(1, 3)
            )
    return text


@pytest.mark.parametrize("seed", range(8))
def test_damaged_policies_never_raise_anything_else(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    originals = [
        file.read_text(encoding="utf-8") for file in (*VALID, *shipped_policies().values())
    ]
    file = tmp_path / "damaged.yaml"
    for _ in range(60):
        file.write_text(mutate(chance.choice(originals), chance), encoding="utf-8")
        problems = validate_file(file)
        assert all(problem.line >= 1 and problem.column >= 1 for problem in problems)
        if any(problem.severity == "error" for problem in problems):
            with pytest.raises(PolicyError):
                load_policy(file)
        else:
            hash(load_policy(file))


def test_nothing_is_constructed_from_tags(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    document = parse_text(f'name: !!python/object/apply:os.mkdir ["{marker}"]\n', "x.yaml")
    assert document.problems
    assert not marker.exists()


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
