"""Asynchronous data parallelism: a parameter server and workers that do not wait for each other.

which worker may go on (bsp, ssp, asp), staleness, backups: `protocol`, pure. what an event does
to a shard: `shard`. parameters over shards: `partition`. gradients, codes and updates: `compute`.
which rows a worker gets: `work`. all shards in one process: `server_group`.

What runs the workers is an engine (`engine`, by name in `engines`): `replay` on a virtual
clock, `threads`, or Ray's actors (`ray_engine` drives, `ray_actors` run, `ray_journal` keeps
what was acknowledged, `ray_rerun` proves it). As the loop calls it: `async_program`.
"""
