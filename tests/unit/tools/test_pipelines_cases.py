"""The tool of the pipelines: cases build and run, and what is no case is found."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

from tools.pipelines.__main__ import main
from tools.pipelines.cases import CASES, FAMILIES, LEFT_OUT
from tools.pipelines.check import check
from tools.pipelines.matrices import ALL, MATRICES


def test_names_are_unique() -> None:
    assert len(CASES) == sum(map(len, FAMILIES))
    rows = sum(map(len, MATRICES.values()))
    assert len(ALL) == len(CASES) + rows


def of_diffusers() -> set[str]:
    """The pipelines with a transformer."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Pipeline")}
    return {
        name
        for name, cls in found.items()
        if "transformer" in inspect.signature(cls.__init__).parameters
    }


@pytest.mark.skipif(diffusers.__version__ != "0.42.1", reason="the pipelines of diffusers 0.42.1")
def test_every_pipeline_has_a_case_or_a_reason() -> None:
    with_case = {name.split(",")[0] for name in CASES}
    assert not with_case & set(LEFT_OUT)
    assert of_diffusers() <= with_case | set(LEFT_OUT)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("FluxPipeline, true CFG", {"transformer": 24}),
        ("WanPipeline, two experts", {"transformer": 8, "transformer_2": 16}),
    ],
)
def test_two_builds_are_equal(name: str, calls: dict[str, int]) -> None:
    assert check(CASES[name]).calls == calls


def test_weights_that_are_drawn_anew_are_found() -> None:
    case = CASES["FluxPipeline"]

    def unseeded() -> Any:
        pipe = case.build()
        torch.nn.init.normal_(pipe.transformer.proj_out.weight)
        return pipe

    with pytest.raises(ValueError, match="FluxPipeline: two builds differ"):
        check(replace(case, build=unseeded))


def test_blind_to_time_is_found() -> None:
    case = CASES["FluxPipeline"]

    def blind() -> Any:
        pipe = case.build()
        torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
        return pipe

    with pytest.raises(ValueError, match="FluxPipeline: two calls of the model are equal"):
        check(replace(case, build=blind))


def test_blind_decoder_is_found() -> None:
    case = CASES["FluxPipeline"]

    def blind() -> Any:
        pipe = case.build()
        pipe.vae.decoder.conv_in.weight.zero_()
        pipe.vae.decoder.conv_in.bias.normal_(generator=torch.Generator().manual_seed(0))
        return pipe

    with pytest.raises(ValueError, match="FluxPipeline: the output does not depend on"):
        check(replace(case, build=blind))


def test_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--check", "FluxPipelin"])
    assert "no case 'FluxPipelin'; there are: DiTPipeline" in capsys.readouterr().err
