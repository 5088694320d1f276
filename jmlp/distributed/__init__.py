"""Several processes that train together.

Slurm, MPI, Kubernetes, TPU slices, jax.distributed: `joining`. which interface is listened on:
`addresses`. what all must agree on, a lost process: `agreement`. `jmlp launch`, restarts, elastic:
`launch`. hosts with slow links, all on one machine, to try it: `hosts`. processes forked after jax
began: `forks`.
"""
