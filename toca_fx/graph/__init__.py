"""What is true of any FX graph: operators, axes, streams, the roles of inputs."""
