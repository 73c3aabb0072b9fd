"""Step graphs -> callables, and what they cost."""
