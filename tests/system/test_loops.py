"""The blocks of docs/loops.md run, and are cached."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toca_fx
from tests.helpers import make_policy, tiny

PAGE = Path(__file__).parents[2] / "docs" / "loops.md"
BLOCKS = dict(
    re.findall(r"^```python (.*?)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
)
LOOPS = [name for name in BLOCKS if name != "setup"]
STEPS = 12


class Denoiser(nn.Module):
    """A tiny model that reads a text, from latents to latents."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("cross")

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        patches = self.inner(x, t=t, y=y).transpose(1, 2)
        return F.fold(patches, x.shape[2:], 2, stride=2)


def run_block(name: str, compiled: bool, texts: tuple[int, int], every: int = 3) -> dict[str, Any]:
    """The variables after a block."""
    draw = torch.Generator().manual_seed(0)
    prompt, negative = (torch.randn(1, length, 32, generator=draw).double() for length in texts)

    def compile_eagerly(model: Any, policy: Any) -> Any:
        return toca_fx.compile(model, policy, inner="eager")

    public = SimpleNamespace(
        compile=compile_eagerly if compiled else lambda model, _: model,
        session=toca_fx.session,
        branch=toca_fx.branch,
    )
    names: dict[str, Any] = {
        "torch": torch,
        "toca_fx": public,
        "model": Denoiser().double().eval(),
        "policy": make_policy(N={"base": every}, scores={"staleness": 1.0}),
        "timesteps": torch.linspace(1000.0, 0.0, STEPS + 1, dtype=torch.float64).tolist(),
        "x": torch.randn(1, 4, 12, 16, generator=draw).double() / 10,
        "prompt": prompt,
        "negative": negative,
        "scale": 2.0,
    }
    exec(BLOCKS["setup"], names)
    exec(BLOCKS[name], names)
    return names


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("texts", [(10, 10), (10, 7)])
def test_a_loop(name: str, texts: tuple[int, int]) -> None:
    if texts[0] != texts[1] and name == "guidance in one batch":
        return
    plain = run_block(name, False, texts)["x"]
    torch.testing.assert_close(
        run_block(name, True, texts, every=1)["x"], plain, rtol=1e-9, atol=1e-9
    )
    cached = run_block(name, True, texts)
    report = cached["run"].report()
    calls = len(report.steps) // STEPS
    assert calls == (2 if texts[0] != texts[1] and "fit" in name else 1)
    assert report.kinds == {"full": 4 * calls, "partial": 8 * calls}
    assert report.warnings == ()
    assert cached["x"].isfinite().all()
    assert not torch.equal(cached["x"], plain)
