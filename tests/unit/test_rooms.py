"""The rooms of the package import each other only as docs/architecture.md has it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tools.rooms import PACKAGE, floors, rooms

COMMANDS = {"cli", "explain_command", "tune_command", "named"}
ENTRIES = {"__init__", "__main__", "backend", "bench", "demo"} | COMMANDS
OPEN_TO_ALL = {"diagnostics"}
WITHOUT_TORCH = ("toca_fx.policy", "toca_fx.plan.planner", "toca_fx.plan.choose", "toca_fx.match")


def table() -> dict[str, set[str]]:
    """What each room may import, from the table of the page."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", page, re.MULTILINE)
    return {room: set(re.findall(r"`(\w+)`", allowed)) for room, allowed in rows}


def test_rooms_import_what_the_table_allows() -> None:
    found, allowed = rooms(), table()
    assert set(found) == set(allowed) | ENTRIES
    for room in set(found) - ENTRIES:
        assert set(found[room]) <= allowed[room] | OPEN_TO_ALL, room
    arrows = [room for _, room in found.edges if room not in OPEN_TO_ALL]
    print(f"{floors(found)} floors, {len(arrows)} arrows")
    assert floors(found) <= 12
    assert len(arrows) <= 62


def test_plans_know_sites_only() -> None:
    """Of what was matched, and of policies what they resolve; no later room looks into one."""
    for file in (PACKAGE / "plan").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"from toca_fx\.match[.\w]*", text)) <= {"from toca_fx.match.sites"}
    for room in ("match", "kernels", "rewrite", "lower", "runtime"):
        for file in (PACKAGE / room).glob("*.py"):
            assert ".policies" not in file.read_text(encoding="utf-8"), file


def test_policies_and_plans_start_without_torch() -> None:
    imports = "".join(f"import {name}; " for name in WITHOUT_TORCH)
    code = f"import sys; {imports}import toca_fx.match.sites; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_files_are_short_and_the_top_has_few() -> None:
    long = {
        str(file.relative_to(PACKAGE)): lines
        for file in PACKAGE.rglob("*.py")
        if (lines := len(Path(file).read_text(encoding="utf-8").splitlines())) >= 400
    }
    assert not long
    assert len(list(PACKAGE.glob("*.py"))) <= 10
