"""Graph -> sites and near misses."""
