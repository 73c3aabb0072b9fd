"""Problems of a policy: each at its line and column, whatever a file holds."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from toca_fx.diagnostics import PolicyError, nearest
from toca_fx.policy import (
    load_policy,
    shipped_policies,
    validate_file,
)
from toca_fx.policy.parse import parse_text
from toca_fx.policy.scalar import read_plain

ROOT = Path(__file__).resolve().parents[3]

POLICIES = ROOT / "tests" / "policies"

VALID = sorted((POLICIES / "valid").glob("*.yaml"))

FAULTY = sorted([*(POLICIES / "invalid").glob("*.yaml"), *(POLICIES / "warnings").glob("*.yaml")])


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
