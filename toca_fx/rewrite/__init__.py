"""Plan -> step graphs: passes over one draft."""
