"""What a device holds during training: measured from shards and the compiled step."""

from typing import Any, NamedTuple

import jax

from jmlp.build import Setup
from jmlp.errors import ConfigError
from jmlp.feed import choose_feed


class Memory(NamedTuple):
    """Bytes on the device that holds most."""

    parameters: int
    optimizer: int
    compressor: int
    """residuals and factors of `comm.reducer`, or DiLoCo's outer state"""
    rows: int
    """of the training data: all of them if resident, else a block in flight"""
    temporaries: int
    """activations, gradients and buffers of a step, by the compiler's own account"""


def held(tree: Any) -> int:
    """Bytes of the arrays in `tree` on the device that holds most, counted by shard."""
    each: dict[Any, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            each[shard.device] = each.get(shard.device, 0) + shard.data.nbytes
    return max(each.values(), default=0)


def of_setup(setup: Setup) -> Memory:
    """Makes the state of a run, compiles its step, and counts; takes no step.

    Raises:
      ConfigError: step=async, whose workers compile parts of their own.
    """
    config, dataset, programs, plan = setup
    if config.step == "async":
        raise ConfigError("memory of step=async: each worker compiles a part of its own")
    state = programs.init(config.seed)
    feed = choose_feed(programs, dataset, plan, lambda text: None)
    call = next(iter(feed.calls(0)))
    started = programs.start(state, call.source, call.first, call.stop, dataset, plan, None)
    compiled: Any = started.call  # the very program that trains
    found = compiled.memory_analysis()
    return Memory(
        parameters=held(state.params),
        optimizer=held(state.opt_state),
        compressor=held(state.comm_state),
        rows=held(call.source),
        temporaries=int(found.temp_size_in_bytes),
    )
