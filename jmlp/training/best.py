"""The weights a run ends with: the last, or the best by `train.monitor`."""

import jax
import jax.numpy as jnp
import numpy as np

from jmlp.checkpoint.checkpoints import Checkpoints
from jmlp.distributed.agreement import first
from jmlp.metrics import better
from jmlp.parallel import TrainState
from jmlp.report import Reporter
from jmlp.training.progress import Progress
from jmlp.training.setup import Setup, selects_best


def _copied(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


class BestWeights:
    """Judges evaluations, and brings the best weights back at the end."""

    def __init__(self, setup: Setup, report: Reporter, checkpoints: Checkpoints | None):
        self._setup, self._report, self._checkpoints = setup, report, checkpoints
        self._monitor = setup.config.train.monitor
        self._selects = selects_best(setup.config)
        self._copy: TrainState | None = None  # where no checkpoint can hold it

    def judge(self, metrics: dict[str, float], state: TrainState, progress: Progress) -> bool:
        """Takes account of an evaluation of the validation rows.

        Returns:
          Whether it is the best one, and must be saved.
        """
        step, value = int(state.step), metrics[self._monitor]
        if not np.isfinite(value):
            self._report.warn(
                f"val {self._monitor} is {value} at step {step}: it is never the best"
            )
        metric = self._setup.programs.evaluation.metric(self._monitor)
        equal = self._setup.config.train.ties == "last"
        if not better(metric, value, progress.best, equal):
            progress.stale += 1
            return False
        progress.best, progress.best_step, progress.stale = value, step, 0
        if self._selects and not self._checkpoints:
            # One program, not a call for each leaf.
            copied = jax.jit(_copied, out_shardings=self._setup.programs.shardings)
            self._copy = copied(state)
        return self._selects

    def selected(self, state: TrainState, progress: Progress) -> TrainState:
        """The weights the run ends with: the best ones if the config selects them."""
        best, last = progress.best_step, int(state.step)
        if not self._selects or best == last:
            return state
        if progress.best is None:
            said = f"no evaluation had a best: ending with the weights of step {last}"
            self._report.warn(said)
            return state
        if self._checkpoints is None:
            return self._copy or state
        return self._restored(self._checkpoints, best)

    def _restored(self, checkpoints: Checkpoints, best: int) -> TrainState:
        # Where the best is lost, the best of what is left comes before the newest.
        among = first(checkpoints.steps)
        step = best if best in among else first(checkpoints.best_step)
        programs = self._setup.programs
        restored = checkpoints.restore(programs.abstract, programs.shardings, step=step)
        assert restored is not None
        for problem in restored.problems:
            self._report.warn(problem)
        if restored.step == best:
            self._report.note(f"ending with the best weights, of step {best}")
        else:
            self._report.warn(
                f"the best weights, of step {best}, are {'damaged' if best in among else 'gone'}: "
                f"ending with those of step {restored.step}"
            )
        return restored.state
