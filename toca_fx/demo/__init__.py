"""A small trained DiT that ships with the package, so that quality can be looked at."""
