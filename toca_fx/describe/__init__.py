"""What is said of a model and a policy without running anything."""
