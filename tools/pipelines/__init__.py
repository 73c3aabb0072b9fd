"""The pipelines of diffusers, of tiny random components: built, called and measured.

Each case (``cases.CASES``) is a pipeline whose transformer has a few blocks of random weights, and
the arguments of one call. Nothing is downloaded: embeddings are given where a pipeline takes them,
else a tiny text encoder reads a tiny vocabulary. ``matrices.ROWS`` are cases too: what people do
to FLUX and Wan 2.2 (``ways``), before they compile them or after.

    python -m tools.pipelines [CASE ...]           # measures what has not been measured
    python -m tools.pipelines --check [CASE ...]   # only builds and calls, uncompiled
"""
