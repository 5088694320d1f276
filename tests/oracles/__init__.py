"""What papers say, in numpy, one device after another: no jax, nothing of jmlp.

Where jmlp departs from a paper (docs/papers.md), that is what is written here. compressed means:
`compressors`. Local steps: `local_steps`. A parameter server: `servers`.
"""
