"""The command line in this process: exit statuses, formats, files that cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from toca_fx.cli import main

POLICIES = Path(__file__).resolve().parents[1] / "policies"

VALID = sorted(map(str, (POLICIES / "valid").glob("*.yaml")))

INVALID = sorted(map(str, (POLICIES / "invalid").glob("*.yaml")))

WARNINGS = sorted(map(str, (POLICIES / "warnings").glob("*.yaml")))


def test_clean_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--strict", *VALID]) == 0
    expected = [*(f"{file}: ok" for file in VALID), f"{len(VALID)} files checked: no problems"]
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("file", INVALID, ids=os.path.basename)
def test_invalid_files(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", file]) == 1
    assert "Traceback" not in capsys.readouterr().out


@pytest.mark.parametrize("file", WARNINGS, ids=os.path.basename)
def test_strict_turns_warnings_into_errors(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", file]) == 0
    assert ": warning: " in capsys.readouterr().out
    assert main(["validate", "--strict", file]) == 1
    assert ": warning: " not in capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(POLICIES / "invalid" / "duplicates.yaml")
    assert main(["validate", "--format", "json", VALID[0], file]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found[0] == {
        "file": file,
        "line": 7,
        "column": 1,
        "message": "duplicate key `R`: it already stands on line 5",
        "severity": "error",
    }
    assert main(["validate", "--format", "json", *VALID]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_unreadable_files_come_before_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    contents = {
        "binary": bytes(range(256)),
        "nul": b"version: 1\0",
        "utf16": "version: 1".encode("utf-16"),
        "latin": b"name: \xe9\n",
        "large": b"# " + b"x" * 10_000_000,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    expected = {
        "binary": "binary data, not UTF-8 text",
        "nul": "binary data, not UTF-8 text",
        "utf16": "binary data, not UTF-8 text",
        "latin": "not UTF-8 text (byte 6)",
        "large": "larger than 128 KiB (a policy fits on one screen)",
        "pipe": "is not a regular file",
        ".": "is a directory",
        "missing": "no such file or directory",
    }
    for name, reason in expected.items():
        file = os.path.join(tmp_path, name)
        assert main(["validate", INVALID[0], file, VALID[0]]) == 2
        assert f"{file}: cannot be read: {reason}" in capsys.readouterr().out.splitlines()
    assert main(["validate", "nul\0in-name"]) == 2


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_forbidden_file(tmp_path: Path) -> None:
    file = tmp_path / "secret.yaml"
    file.touch(mode=0o000)
    assert main(["validate", str(file)]) == 2


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    file = tmp_path / "bom.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + Path(VALID[0]).read_bytes().replace(b"\n", b"\r\n"))
    assert main(["validate", str(file)]) == 0


def test_usage_errors_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["validate"], ["validate", "--format", "xml", VALID[0]], ["nonsense"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert "toca-fx 0.1.0" in capsys.readouterr().out
