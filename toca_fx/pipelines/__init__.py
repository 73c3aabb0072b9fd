"""Diffusers' pipelines, compiled in one line: what their schedulers say is told to the clock."""
