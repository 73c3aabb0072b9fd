"""Which releases of torch were tried, and what is said of newer ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import toca_fx
from toca_fx import torch_private as private

PACKAGE = Path(toca_fx.__file__).parent


def test_a_torch_that_was_not_tried_is_named() -> None:
    pyproject = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    newest, minor = private.NEWEST_TRIED
    assert f'"torch>=2.11,<{newest}.{minor + 1}"' in pyproject
    assert not private.is_newer(f"{newest}.{minor}.9")
    code = "import torch; torch.__version__ = '2.16.0a0+git1'; import toca_fx.torch_private"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("tried with torch up to 2.15, and this is 2.16.0a0+git1") == 1
