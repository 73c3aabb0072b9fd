"""Scripts of the project: training, benchmarks, tables."""
