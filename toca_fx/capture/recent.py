"""Which captures of a model's code Dynamo keeps."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any

from toca_fx.torch_private import captures, keep_captures

_MOST = 32  # of one code, with their guards


def is_first(code: CodeType) -> bool:
    """Whether Dynamo, which is capturing ``code``, keeps no capture of it: so after a reset."""
    return not captures(code)


def keep_recent(code: CodeType, own: Callable[[Any], bool]) -> None:
    """Let Dynamo forget the captures of ``code`` by one's ``own`` backends, but the latest."""
    keep_captures(code, _MOST, own)
