"""All cases by name."""

from __future__ import annotations

from tools.pipelines.case import Case
from tools.pipelines.families import (
    classic,
    cosmos,
    flux,
    flux2,
    hunyuan,
    image,
    kandinsky,
    ltx2,
    modular,
    qwen,
    sana,
    sd3,
    skyreels,
    sound,
    video,
    wan,
)

_MODULES = (
    classic,
    cosmos,
    flux,
    flux2,
    hunyuan,
    image,
    kandinsky,
    ltx2,
    modular,
    qwen,
    sana,
    sd3,
    skyreels,
    sound,
    video,
    wan,
)

FAMILIES = tuple(module.CASES for module in _MODULES)

CASES: dict[str, Case] = {case.name: case for family in FAMILIES for case in family}
