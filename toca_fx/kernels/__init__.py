"""Tensor mathematics: scores, rankings, column sums."""
