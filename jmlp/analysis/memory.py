"""What a device holds during training: measured from shards and the compiled step."""

from typing import NamedTuple

import jax

from jmlp.errors import ConfigError
from jmlp.parallel import strategy_of
from jmlp.training.feed import choose_feed
from jmlp.training.setup import Setup
from jmlp.types import PyTree


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


def held(tree: PyTree) -> int:
    """Bytes of the arrays in `tree` on the device that holds most, counted by shard."""
    each: dict[object, int] = {}
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
    strategy = strategy_of(config)
    if not strategy.one_program:
        raise ConfigError(f"memory of {strategy.asked}: each worker compiles a part of its own")
    state = programs.init(config.seed)
    feed = choose_feed(programs, dataset, plan, lambda text: None)
    call = next(iter(feed.calls(0)))
    started = programs.start(state, call.source, call.first, call.stop, dataset, plan, None)
    compiled = started.call  # the very program that trains
    assert isinstance(compiled, jax.stages.Compiled)
    needs = compiled.memory_analysis()
    assert needs is not None
    return Memory(
        parameters=held(state.params),
        optimizer=held(state.opt_state),
        compressor=held(state.comm_state),
        rows=held(call.source),
        temporaries=int(needs.temp_size_in_bytes),
    )
