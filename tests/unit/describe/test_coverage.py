"""The example classes of diffusers: enough are supported, and the package knows none by name."""

from __future__ import annotations

from pathlib import Path

import toca_fx
from toca_fx.examples import UNSUPPORTED, examples
from tools.coverage_table import PARTLY, REFUSED


def test_enough_classes_are_supported() -> None:
    assert len(set(examples()) - set(REFUSED) - set(PARTLY)) >= 20
    assert {*REFUSED, *PARTLY} <= set(examples())


def test_the_package_knows_no_model_by_name() -> None:
    package = Path(toca_fx.__file__).parent
    files = [
        file
        for file in package.rglob("*.*")
        if file.suffix in (".py", ".json") and "examples" not in file.parts
    ]
    assert len(files) > 30
    named = {
        (file.name, name)
        for file in files
        for name in {*examples(), *UNSUPPORTED}
        if name in file.read_text(encoding="utf-8")
    }
    assert named == set()
