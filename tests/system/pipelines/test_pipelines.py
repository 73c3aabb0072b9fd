"""Every pipeline of diffusers that tiny components allow, in one line (docs/pipelines.md)."""

from __future__ import annotations

import pytest

from tests.marks import slow_but
from tools.pipelines.cases import CASES
from tools.pipelines.matrices import MATRICES
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
# Cached and exact; what is said against it is in docs/pipelines.md.
WARNED = ("Lumina2Pipeline",)
ROWS = {name: row for rows in MATRICES.values() for name, row in rows.items()}
# One of each matrix.
ROWS_OFTEN = (
    "FluxPipeline, leaves on disk, after compiling",
    "FluxPipeline, quanto int8",
    "FluxPipeline, loaded",
    "FluxPipeline, attention sage",
)
NAMED = tuple(name for name in CASES if name not in WARNED)


@pytest.mark.parametrize("name", slow_but(OFTEN, NAMED, "ten others have one of each kind"))
def test_it_is_right(name: str) -> None:
    row = measured(CASES[name])
    assert row.right, row


@pytest.mark.parametrize("name", slow_but(ROWS_OFTEN, ROWS, "a row of each matrix is enough"))
def test_a_row_of_a_matrix_is_right(name: str) -> None:
    row = measured(ROWS[name])
    assert row.right, row
