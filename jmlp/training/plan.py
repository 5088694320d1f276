"""Where a run's calls must end, in steps."""

from typing import NamedTuple

from jmlp.config import Config
from jmlp.data.batches import Span, steps_per_epoch


class RunPlan(NamedTuple):
    """Where a run's calls must end, in steps: epochs, evaluations, checkpoints."""

    total: int
    per_epoch: int
    eval_every: int
    save_every: int

    def until(self, step: int) -> int:
        """The first boundary after `step`."""
        every = (self.per_epoch, self.eval_every, self.save_every)
        return min(self.total, *((step // n + 1) * n for n in every))

    def span(self, step: int, most: int) -> Span:
        """The steps of the next call: no more than `most`, and within an epoch."""
        count = min(self.until(step) - step, most)
        return Span(step // self.per_epoch, step % self.per_epoch, count)

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after `step` steps."""
        return step % self.eval_every == 0 or step >= self.total

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        return step % self.save_every == 0 or step >= self.total


AUTO_STEPS, AUTO_EPOCHS = 2_000, (20, 200)
AUTO_EVALS, AUTO_SAVES = 20, 10  # of a run


def epochs_of(config: Config, rows: int) -> int:
    """Epochs of a run over so many training rows, unless `train.steps` ends it."""
    train = config.train
    if train.epochs != "auto":
        return train.epochs
    least, most = AUTO_EPOCHS
    return min(most, max(least, -(-AUTO_STEPS // _per_epoch(config, rows))))


def make_plan(config: Config, rows: int) -> RunPlan:
    """The plan of a run over so many training rows."""
    train = config.train
    per_epoch = _per_epoch(config, rows)
    total = train.steps or epochs_of(config, rows) * per_epoch
    evals = _in_steps(train.eval_every, per_epoch, total, AUTO_EVALS)
    saves = _in_steps(train.checkpoint_every, per_epoch, total, AUTO_SAVES)
    return RunPlan(total, per_epoch, evals, saves)


def _per_epoch(config: Config, rows: int) -> int:
    return steps_per_epoch(rows, config.train.batch_size, config.train.short_batch == "keep")


def _in_steps(every: str, per_epoch: int, total: int, times: int) -> int:
    if every == "auto":
        return per_epoch * max(1, -(-total // (per_epoch * times)))
    number, unit = every.split()
    return int(number) * (per_epoch if unit.startswith("epoch") else 1)
