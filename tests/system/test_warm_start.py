"""A second process finds what the first one compiled, and nothing that was compiled for something
else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
POLICY = {"scores": {"value_norm": 1.0}}
TOLERANCE = 1e-4  # sinusoids of timesteps near 1000 are in single precision and lose three digits

# Runs one generation with inductor and one with "eager"; prints what the compiler found in its
# caches, and how far the two are apart.
SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
import toca_fx
from tests.helpers import make_inputs, make_policy, run_all, tiny

if "changed" in sys.argv:  # as another version of the package would
    from dataclasses import replace
    from toca_fx.kernels.scores import OF_ATTENTION
    row = OF_ATTENTION["value_norm"]
    changed = replace(row, formula=lambda feature: 3 * row.formula(feature) ** 2)
    OF_ATTENTION["value_norm"] = changed

model = tiny("diffusers", layers=2).double()
outputs = []
for inner in ("inductor", "eager"):
    torch._dynamo.reset()
    fast = toca_fx.compile(model, make_policy(**json.loads(sys.argv[1])), inner=inner)
    with toca_fx.session():
        outputs.append(run_all(fast, make_inputs(dtype=torch.float64)))
    if inner == "inductor":
        cache = counters["aot_autograd"]
        missed = cache["autograd_cache_miss"] + cache["autograd_cache_bypass"]
        found = {"hits": cache["autograd_cache_hit"], "misses": missed}
error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*outputs))
print(json.dumps({**found, "error": error}))
"""


def run(folder: Path, policy: dict[str, Any], *arguments: str) -> dict[str, float]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(policy), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


pytestmark = pytest.mark.slow(reason="processes that compile with empty caches")


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("inductor")
    return folder, run(folder, POLICY)


def test_a_second_process_compiles_nothing(cold: tuple[Path, dict[str, float]]) -> None:
    folder, first = cold
    assert first["misses"] > 0
    second = run(folder, POLICY)
    assert (second["hits"], second["misses"]) == (first["hits"] + first["misses"], 0)
    assert second["error"] < TOLERANCE


@pytest.mark.parametrize(
    ("policy", "arguments"),
    [({"scores": {"key_norm": 1.0}}, ()), (POLICY, ("changed",))],
    ids=["policy", "package"],
)
def test_what_changed_is_compiled_anew(
    cold: tuple[Path, dict[str, float]], policy: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    folder, _ = cold
    found = run(folder, policy, *arguments)
    assert found["misses"] > 0
    assert found["hits"] > 0, "partial steps are the same"
    assert found["error"] < TOLERANCE
