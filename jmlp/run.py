"""A run from its config to its result: on one process, or on several in step."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import optax

from jmlp import layout
from jmlp.build import (
    ModelFactory,
    Setup,
    open_checkpoints,
    prepare,
    resolve_mesh,
    with_full_paths,
)
from jmlp.config import Config, flatten, parse_config
from jmlp.errors import ConfigError
from jmlp.interrupt import stop_on_signal
from jmlp.loop import Loop, Result
from jmlp.mesh import thread_pool_size
from jmlp.processes import first, gather_texts, is_first, peers, together
from jmlp.report import Reporter
from jmlp.rundir import Follower, RunDir


def train(
    config: Config | Mapping[str, Any],
    data: Any = None,
    *,
    run_dir: Path | str | None = None,
    model: ModelFactory | None = None,
    tx: optax.GradientTransformation | None = None,
    rules: Sequence[layout.Rule] | None = None,
    report: Reporter | None = None,
    show_wire: bool = False,
) -> Result:
    """Trains as `config` says, or continues the run in `run_dir`.

    Args:
      config: a `Config` or a nested mapping with its keys.
      data: `(x, y)` or `{"x": ..., "y": ..., "x_val": ...}` in place of `config.data`'s source.
      run_dir: where logs and checkpoints go; None keeps nothing on disk.
      model: `nnx.Rngs -> nnx.Module` in place of `jmlp.MLP`: (B, F) to (B, K).
      tx: an optax transformation in place of `config.optim`'s.
      rules: `(pattern, axes)` on parameter paths, for tensor parallelism of `model`.
      show_wire: report every collective of the compiled step; `summary["wire"]` has them.

    Raises:
      ConfigError, DataError, RunDirError: what was asked for cannot be done.
      TrainingError: the loss is not finite, or a checkpoint cannot be written.
      PeerLost: another process of the job is gone.

    With several processes (`jmlp.join` first) all call it, with the same arguments; process
    0 alone logs and writes the run directory, which must lie where all see it.
    """
    report = (report or Reporter.quiet()) if is_first() else Reporter.silent()
    with ExitStack() as stack:
        stack.enter_context(stop_on_signal())
        stack.enter_context(peers())
        directory, resolved = None, together(lambda: resolve_mesh(parse_config(config))[0])
        together(lambda: _check_alone(resolved))
        if run_dir is not None:
            resolved = with_full_paths(resolved)
            mine = RunDir(run_dir) if is_first() else Follower(run_dir)
            directory = together(lambda: stack.enter_context(mine))
            for change in first(lambda: mine.check(resolved)):
                report.note(change)
        report.note("loading data and models ...")
        setup = together(lambda: prepare(config, data, model=model, tx=tx, rules=rules))
        _check_same(setup)
        if directory:
            leaves = jax.tree.leaves(setup.programs.abstract)
            nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
            together(lambda: _open(directory, resolved, nbytes))
        if resolved.reproducible:
            _check_threads(resolved, report)
        checkpoints = None
        if directory:
            checkpoints = stack.enter_context(open_checkpoints(setup.config, directory.checkpoints))
        custom = [name for name, given in (("model", model), ("tx", tx)) if given is not None]
        loop = Loop(setup, report, directory, checkpoints, custom, show_wire)
        return loop.fit()


def _open(directory: RunDir, config: Config, nbytes: int) -> None:
    directory.require_space(nbytes)
    directory.adopt(config)
    if config.train.tensorboard:
        directory.open_tensorboard()


def _check_threads(config: Config, report: Reporter) -> None:
    want, have = 4 * config.virtual_shards, thread_pool_size()
    if jax.default_backend() == "cpu" and have != want:
        report.warn(
            f"reproducible: XLA's thread pool is {have or 'by the number of cores'}, not {want}: "
            f"bits equal those of runs with the same pool only. Set PJRT_NPROC={want} before "
            "Python starts; jmlp train does"
        )


def _check_alone(config: Config) -> None:
    if config.step == "async" and jax.process_count() > 1:
        raise ConfigError(
            "step=async over several processes: its workers are threads of one process, or, with "
            "server.engine: ray, processes that Ray starts. Start jmlp train once"
        )


def _check_same(setup: Setup) -> None:
    """Refuses processes that were started with different configs or files."""
    mine = {"config": repr(flatten(setup.config)), "data": setup.dataset.fingerprint}
    everybody = [json.loads(text) for text in gather_texts(json.dumps(mine))]
    for number, theirs in enumerate(everybody):
        for what, ours in everybody[0].items():
            if theirs[what] != ours:
                raise ConfigError(f"process {number} has another {what} than process 0")
