"""Model libraries that toca_fx ships example models for; nothing else in the package names their classes."""
