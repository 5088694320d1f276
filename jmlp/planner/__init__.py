"""What to train a config as, before it is trained: memory and time by formula.

what devices can do, `--on`: `hardware`, and of those here `here`; their figures: `kinds/`. what a
step keeps alive, from its trace: `liveness`, `workload`. bytes of a device: `memory`. what is sent
and how long it takes: `exchange`. the time of a step: `seconds`. which ways there are:
`candidates`. all of it ranked: `planning`. Compiling the best is above, in `jmlp.analysis`.
"""
