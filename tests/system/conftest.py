"""Fixtures of tests that look into memories."""

from __future__ import annotations

from tests.helpers import keep_memories

__all__ = ["keep_memories"]
