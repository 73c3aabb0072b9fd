"""All cases by name."""

from __future__ import annotations

from tools.pipelines.case import Case
from tools.pipelines.families import classic, flux, sd3, wan

FAMILIES = (classic.CASES, flux.CASES, sd3.CASES, wan.CASES)

CASES: dict[str, Case] = {case.name: case for family in FAMILIES for case in family}
