"""Every pipeline of diffusers that tiny components allow, in one line (docs/pipelines.md)."""

from __future__ import annotations

import pytest

from tests.marks import slow_but
from tools.pipelines.case import Case
from tools.pipelines.cases import CASES
from tools.pipelines.matrices import ROWS
from tools.pipelines.measure import measured

OFTEN = (
    "DiTPipeline",  # a scheduler that does not count, guidance in one batch
    "FluxPipeline, true CFG",
    "FluxControlNetPipeline",  # conditions that are new at every call
    "StableDiffusion3Pipeline, Heun",
    "StableDiffusion3Pipeline, SLG",  # a branch that ends early
    "WanPipeline, 5B",  # a timestep for each token
    "WanPipeline, two experts",
    "LuminaPipeline",  # 1 - t / 1000
    "Kandinsky5T2VPipeline",  # branches that nobody names
    "SkyReelsV2DiffusionForcingPipeline",  # a scheduler that nobody steps
)
# One of each matrix.
ROWS_OFTEN = (
    "FluxPipeline, leaves on disk, after compiling",
    "FluxPipeline, quanto int8",
    "FluxPipeline, loaded",
    "FluxPipeline, attention sage",
)


def check(case: Case) -> None:
    """It is right, or it is known why it is not."""
    row = measured(case)
    assert row.right == (not case.known), row


@pytest.mark.parametrize("name", slow_but(OFTEN, CASES, "ten others have one of each kind"))
def test_a_pipeline(name: str) -> None:
    check(CASES[name])


@pytest.mark.parametrize("name", slow_but(ROWS_OFTEN, ROWS, "a row of each matrix is enough"))
def test_what_is_done_to_flux_or_wan(name: str) -> None:
    check(ROWS[name])
