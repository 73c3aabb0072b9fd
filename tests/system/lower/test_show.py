"""Those who look on see what each pass did, and the graphs before and after."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

GENERATION = """
import torch, toca_fx
from tests.helpers import make_inputs, make_policy, run_all, tiny
fast = toca_fx.compile(tiny("original", layers=1), make_policy(), inner="eager")
with toca_fx.session():
    run_all(fast, make_inputs())
"""


def test_logs_and_traces(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_LOGS": "+toca_fx", "TORCH_TRACE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", GENERATION],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    for line in ("memories: 2 sites", "fresh tokens: 1 sites", "scores of attention: 1 sites"):
        assert line in done.stderr
    graphs = ("captured", "step_0_full", "step_1_partial")
    assert all(f"{graph}\n" in done.stderr for graph in graphs)
    assert "torch.ops.aten.scaled_dot_product_attention" in done.stderr
    traced = "".join(file.read_text(encoding="utf-8") for file in tmp_path.iterdir())
    assert all(f'"name": "toca_fx_{graph}"' in traced for graph in graphs)
