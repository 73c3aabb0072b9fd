"""Sizes of the small models whose attention and MLP are spelled in many ways."""

from __future__ import annotations

WIDTH, HEADS, HIDDEN, BLOCKS, STEPS = 16, 2, 32, 2, 6
BATCH, SIDE = 2, 4
TOKENS = SIDE * SIDE
SCALE = (WIDTH // HEADS) ** -0.5
