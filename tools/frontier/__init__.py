"""Quality against time: fewer steps, better solvers, and policies, on models that are trained.

    python -m tools.frontier digits
    python -m tools.frontier emoji --weights FOLDER
    python -m tools.frontier digits --points digits+ddim:50 --time
    python -m tools.frontier digits --points diffusers/first-block:threshold=0.1+ddim:50
    python -m tools.frontier digits --draw

A point is ``SAMPLER:STEPS``, ``SAMPLER:GRID`` (timesteps by name, in the file of ``--grids``) or
``POLICY+SAMPLER:STEPS``; in the place of the policy there may be another cache, ``PEER`` or
``PEER:KEY=VALUE,...`` (``PEERS`` in caches.py). Without ``--points`` they are the uncached ones.
What was measured is kept in tools/results/frontier-MODEL.json, and not measured again; --draw makes
a picture and a table of it.
"""
