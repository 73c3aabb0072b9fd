"""What people do to FLUX and Wan 2.2, one matrix for each kind: its rows are cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from torch import nn

from toca_fx.pipelines.twin import transformers_of
from tools.pipelines.case import Case
from tools.pipelines.cases import CASES
from tools.pipelines.families.flux import flux
from tools.pipelines.families.wan import experts
from tools.pipelines.ways.adapters import SEQUENCES
from tools.pipelines.ways.attention import BACKENDS, attention
from tools.pipelines.ways.offload import (
    MODES,
    Mode,
    on_disk,
    sequential,
    sequential_with_buffers,
)
from tools.pipelines.ways.weights import SCHEMES, Quantise, add_lora

FLUX, WAN = CASES["FluxPipeline"], CASES["WanPipeline, two experts"]

_ROUNDING = 1e-4
"""How far other compilers' full steps may be off, of images in [0, 1]."""

_NATIVE_MATH = "regions of torch.nn.attention.sdpa_kernel are dropped: the default kernel runs"

# By name what ``toca_fx.compile`` is given.
_COMPILERS: dict[str, dict[str, Any]] = {
    "eager": {"inner": "eager"},
    "aot_eager": {"inner": "aot_eager"},
    "inductor": {"inner": "inductor"},
    'inductor, mode="reduce-overhead"': {"mode": "reduce-overhead"},
    "cudagraphs": {"inner": "cudagraphs"},
}


def _row(base: Case, way: str, **changes: Any) -> Case:
    return replace(base, name=f"{base.name}, {way}", **changes)


def _built(build: Callable[[], Any], change: Callable[[Any], None]) -> Callable[[], Any]:
    """A pipeline that is changed before it is compiled."""

    def changed() -> Any:
        pipe = build()
        change(pipe)
        return pipe

    return changed


def _of_models(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """Change the transformers of a pipeline."""

    def of_pipeline(pipe: Any) -> None:
        for model in transformers_of(pipe).values():
            change(model)

    return of_pipeline


# Offload


@cache
def _disk() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="toca_fx_offload_")  # gone when the process ends


def _offloaded(mode: Mode) -> Callable[[Any], None]:
    """All components where a pipeline asks any of them for its device, else the transformers."""

    def change(pipe: Any) -> None:
        whole = mode in (sequential, sequential_with_buffers, on_disk)
        of = pipe.components if whole else transformers_of(pipe)
        for model in of.values():
            if isinstance(model, nn.Module):
                mode(model, Path(mkdtemp(dir=_disk().name)))

    return change


def _offload(base: Case) -> Iterable[Case]:
    yield _row(base, "no offload")
    for mode in MODES:
        name, change = mode.__name__.replace("_", " "), _offloaded(mode)
        yield _row(base, f"{name}, before compiling", build=_built(base.build, change))
        yield _row(base, f"{name}, after compiling", changes=(change,))


# Weights

# 64 channels, which fit all schemes.
_WIDE = {"num_attention_heads": 4}
_WIDE_ONES: dict[str, Callable[[], Any]] = {
    FLUX.name: lambda: flux("FluxPipeline", _WIDE),
    WAN.name: lambda: experts(**_WIDE),
}


def _weights(base: Case) -> Iterable[Case]:
    for name, quantise in SCHEMES.items():
        change = _of_models(partial(_quantised, quantise))
        build = _built(_WIDE_ONES[base.name], change)
        yield _row(base, name, build=build)
        if name in ("torchao int8", "quanto int8", "bitsandbytes NF4"):
            build = _built(build, _of_models(add_lora))
            yield _row(base, f"{name}, LoRA on top", build=build)


def _quantised(quantise: Quantise, model: nn.Module) -> None:
    """The blocks, and nothing around them, as is usual."""
    for blocks in model.children():
        if isinstance(blocks, nn.ModuleList):
            quantise(blocks)


def _adapters(base: Case) -> Iterable[Case]:
    for name, operations in SEQUENCES.items():
        yield _row(base, name, changes=operations)


def _backends(base: Case) -> Iterable[Case]:
    for name, options in _COMPILERS.items():
        tolerance = 0.0 if name == "eager" else _ROUNDING
        yield _row(base, name, options=options, tolerance=tolerance)
    for name in BACKENDS:
        build = _built(base.build, _of_models(attention(name)))
        known = _NATIVE_MATH if name == "_native_math" else ""
        yield _row(base, f"attention {name}", build=build, known=known)


def _matrix(rows: Callable[[Case], Iterable[Case]]) -> dict[str, Case]:
    return {case.name: case for base in (FLUX, WAN) for case in rows(base)}


MATRICES: dict[str, dict[str, Case]] = {
    "offload": _matrix(_offload),
    "weights": _matrix(_weights),
    "adapters": _matrix(_adapters),
    "backends": _matrix(_backends),
}

ROWS: dict[str, Case] = {name: row for matrix in MATRICES.values() for name, row in matrix.items()}
ALL: dict[str, Case] = {**CASES, **ROWS}
