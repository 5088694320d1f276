"""The config: what a run is asked to be, read from YAML, Python and `--key.sub=value`.

the whole, `Config`: `run`. a section and its keys with their meanings: `sections`. sections whose
keys depend on a word in them (compressors, topologies): `tables`. reading, every mistake at once:
`load`. what keys are made of, whether a run may change one and go on: `fields`. their names,
`--help`, advice on a mistyped one: `keys`. YAML as people mean it: `yaml12`.
Nothing here imports jax.
"""

from jmlp.config.load import flatten, load_config, override_config, parse_config
from jmlp.config.run import Config

__all__ = ["Config", "flatten", "load_config", "override_config", "parse_config"]
