"""The command line: exit statuses, formats, files that cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toca_fx.cli import main

POLICIES = Path(__file__).resolve().parents[1] / "policies"

VALID = sorted(map(str, (POLICIES / "valid").glob("*.yaml")))

INVALID = sorted(map(str, (POLICIES / "invalid").glob("*.yaml")))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toca_fx", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=60,
    )


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    file = tmp_path / "größe-\udcff.yaml"
    file.write_text("ключ: 1\n", encoding="utf-8")
    for form in ("text", "json"):
        result = run(
            "validate", "--format", form, str(file), PYTHONIOENCODING="ascii", PYTHONUTF8="0"
        )
        assert (result.returncode, result.stderr) == (1, "")


def test_validate_does_not_import_torch() -> None:
    code = (
        "import sys; from toca_fx.cli import main; "
        "main(['validate', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code, VALID[0]], capture_output=True, check=False
        ).returncode
        == 0
    )


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f'"{sys.executable}" -m toca_fx validate --format json {" ".join(INVALID * 6)} | true'
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


# explain

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.mlp(x)

class Model(nn.Module):
    def __init__(self, broken=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.broken = broken

    def forward(self, x):
        if self.broken:
            torch._dynamo.graph_break()
        for block in self.blocks:
            x = block(x)
        return x

def make(batch=2):
    return Model(), {"x": torch.randn(batch, 9, 8)}

def broken():
    return Model(broken=True), {"x": torch.randn(2, 9, 8)}

def nothing():
    return Model(), 3
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    file = tmp_path / "factory.py"
    file.write_text(FACTORY, encoding="utf-8")
    return str(file)


def test_explain_a_function(
    factory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        main(["explain", f"{factory}:make", "--policy", "reference/toca-image", "--steps", "10"])
        == 0
    )
    page = capsys.readouterr().out
    assert "steps      10: " in page
    assert "blocks.0-1.mlp  mlp              9 tokens" in page
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["explain", "factory:make", "--batch", "4", "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["policy"] == "default-image"
    sites = {site["path"]: site["kind"] for site in data["sites"]}
    assert sites == {"blocks.0.mlp": "mlp", "blocks.1.mlp": "mlp", "": "output"}
    assert data["flops"]["uncached"] == 50 * 2 * (2 * 4 * 9 * 8 * 16) * 2


def test_explain_an_example_of_diffusers(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["explain", "DiTTransformer2DModel", "--batch", "1", "--policy", "reference/toca-image"]
        )
        == 0
    )
    assert "transformer_blocks.0-1.ff " in capsys.readouterr().out


def test_explain_unknown_names(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (
            ["DiTTransformer2DModl"],
            "unknown model `DiTTransformer2DModl`; did you mean `DiTTransformer2DModel`?",
        ),
        (["dit-xl-2-265"], "did you mean `dit-xl-2-256`?"),
        (
            ["PriorTransformer"],
            "there is no example of `PriorTransformer`: denoises one embedding vector",
        ),
        ([f"{factory}:mak"], "has no function `mak`; did you mean `make`?"),
        (["nowhere.py:make"], "there is no file `nowhere.py`"),
        (["no.such.module:make"], "there is no module `no.such.module`"),
        (
            [f"{factory}:nothing"],
            "expected the function to return (module, mapping of keyword arguments), "
            "got (Model, int)",
        ),
        ([f"{factory}:make", "--policy", "defalt-image"], "did you mean `default-image`?"),
    ):
        assert main(["explain", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_explain_problems(factory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "explain",
                f"{factory}:make",
                "--policy",
                str(POLICIES / "invalid" / "duplicates.yaml"),
            ]
        )
        == 1
    )
    assert ":7:1: duplicate key `R`" in capsys.readouterr().err
    file = tmp_path / "policy.yaml"
    text = (
        "version: 1\nname: x\nsampler: {steps: 4}\n"
        "N: {base: 2}\nR: {base: 0.5}\nscores: {staleness: 1}\n"
    )
    file.write_text(f"{text}rules:\n  - {{path: nowhere, module: compute}}\n", encoding="utf-8")
    assert main(["explain", f"{factory}:make", "--policy", str(file)]) == 1
    assert f"{file}:8:5: the rule matches none of the 2 sites" in capsys.readouterr().err
    assert main(["explain", f"{factory}:broken"]) == 1
    assert "the model cannot be captured as one graph" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["explain", f"{factory}:make", "--steps", "0"])
    assert error.value.code == 2
