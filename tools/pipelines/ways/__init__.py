"""What people do to a model or a pipeline: offload, quantise, adapt it, choose its attention."""
