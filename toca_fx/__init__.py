"""Token-wise feature caching for diffusion transformers, compiled from a YAML policy.

The public names are loaded on first use: `toca-fx validate` and `load_policy` must start without
importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toca_fx.backend import compile as compile
    from toca_fx.describe.explain import explain as explain
    from toca_fx.describe.explanation import Explanation as Explanation
    from toca_fx.diagnostics import PolicyError as PolicyError
    from toca_fx.diagnostics import UnsupportedModelError as UnsupportedModelError
    from toca_fx.match.fused import register_attention as register_attention
    from toca_fx.pipelines.twin import last_report as last_report
    from toca_fx.policy import Policy as Policy
    from toca_fx.policy import load_policy as load_policy
    from toca_fx.quality.calibrate import calibrate as calibrate
    from toca_fx.runtime.context import branch as branch
    from toca_fx.runtime.context import session as session
    from toca_fx.runtime.report import Report as Report

__version__ = "0.1.0"

_HOME = {
    "compile": "toca_fx.backend",
    "calibrate": "toca_fx.quality.calibrate",
    "explain": "toca_fx.describe.explain",
    "Explanation": "toca_fx.describe.explanation",
    "register_attention": "toca_fx.match.fused",
    "session": "toca_fx.runtime.context",
    "branch": "toca_fx.runtime.context",
    "last_report": "toca_fx.pipelines.twin",
    "Report": "toca_fx.runtime.report",
    "load_policy": "toca_fx.policy",
    "Policy": "toca_fx.policy",
    "PolicyError": "toca_fx.diagnostics",
    "UnsupportedModelError": "toca_fx.diagnostics",
}

__all__ = [
    "Explanation",
    "Policy",
    "PolicyError",
    "Report",
    "UnsupportedModelError",
    "__version__",
    "branch",
    "calibrate",
    "compile",
    "explain",
    "last_report",
    "load_policy",
    "register_attention",
    "session",
]


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
