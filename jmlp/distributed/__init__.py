"""Several processes that train together.

Slurm, MPI, Kubernetes, TPU slices, jax.distributed: `joining`. what all must agree on, a lost
process: `agreement`. `jmlp launch`, restarts, elastic: `launch`. processes forked after jax
began: `forks`.
"""
