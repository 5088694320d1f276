"""What the benches of speed share: cases, interleaved runs, and rows with ratios."""

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from jmlp.analysis.rows import CaseRow
from jmlp.errors import ConfigError
from jmlp.report import Reporter
from jmlp.types import JsonObject

if TYPE_CHECKING:
    from jmlp.training.loop import Loop

FEATURES, CLASSES = 784, 10
CASES = ("64-64/64", "512-512/256", "2048-2048/1024")

Measured = Callable[[], float]


class Case(NamedTuple):
    """A model and a batch size, written `512-512/256`."""

    hidden: tuple[int, ...]
    batch: int

    @property
    def name(self) -> str:
        return f"{'-'.join(map(str, self.hidden))}/{self.batch}"

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(in, out) of each layer."""
        widths = [FEATURES, *self.hidden, CLASSES]
        return list(zip(widths[:-1], widths[1:], strict=True))

    @property
    def flops_per_sample(self) -> int:
        """Of the matrix products of a training step: no gradient is taken by the inputs."""
        return sum(6 * a * b for a, b in self.sizes) - 2 * self.sizes[0][0] * self.sizes[0][1]

    def steps(self, seconds: float, least: int) -> int:
        """Training steps that take so long at about 100 GFLOP/s."""
        return max(least, round(seconds * 100e9 / (self.flops_per_sample * self.batch)))


def adam_loop(
    case: Case, rows: object, train: JsonObject, data: JsonObject | None = None
) -> "Loop":
    """jmlp's own `Loop` for `case` on one device: Adam at a constant rate, no rows held out.

    Args:
      rows: as `prepare` takes them; None where `data` names a file.
      train, data: keys of these sections of the config.
    """
    from jmlp.config import parse_config
    from jmlp.training.loop import Loop
    from jmlp.training.setup import prepare

    config = {
        "model": {"hidden": list(case.hidden)},
        "step": "single",
        "data": {"val_fraction": 0.0, "test_fraction": 0.0} | (data or {}),
        "optim": {"name": "adam", "schedule": "constant"},
        "train": {"batch_size": case.batch} | train,
    }
    return Loop(prepare(parse_config(config), rows), Reporter.quiet())


def parse_cases(texts: Sequence[str]) -> list[Case]:
    """Cases from texts like `512-512/256`.

    Raises:
      ConfigError: a text is not of that form.
    """
    cases: list[Case] = []
    for text in texts:
        if not re.fullmatch(r"[1-9]\d{0,5}(-[1-9]\d{0,5})*/[1-9]\d{0,6}", text):
            raise ConfigError(f"--cases {text}: expected widths and a batch size, e.g. 512-512/256")
        hidden, batch = text.split("/")
        cases.append(Case(tuple(map(int, hidden.split("-"))), int(batch)))
    return cases


def interleaved(timed: Mapping[str, Measured], repeats: int) -> dict[str, list[float]]:
    """Calls all in turn (A B C A B C ...), `repeats` times after one round for nothing."""
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(repeats + 1):
        for name, once in timed.items():
            speed = once()
            if round_:
                samples[name].append(float(f"{speed:.6g}"))
    return samples


def compared(
    case: Case | str, samples: Mapping[str, Sequence[float]], against: str, simulated: bool = False
) -> list[CaseRow]:
    """Rows of `case, name, samples_per_second, ratio, against`.

    `ratio` is the median over rounds of this row's speed by `against`'s in the same round;
    None where devices are simulated, whose speed says nothing.
    """
    rows: list[CaseRow] = []
    for name, speeds in samples.items():
        ratios = [a / b for a, b in zip(speeds, samples[against], strict=True)]
        ratio = None if simulated else round(median(ratios), 3)
        rows.append(
            {
                "case": case if isinstance(case, str) else case.name,
                "name": name,
                "samples_per_second": list(speeds),
                "ratio": ratio,
                "against": against,
            }
        )
    return rows


def _ratio(row: CaseRow) -> str:
    if row["ratio"] is None:
        return "simulated: not ranked"
    return f"{row['ratio']:5.2f} of {row['against']}"


def say(rows: Sequence[CaseRow], report: Reporter) -> None:
    """One line a row."""
    for row in rows:
        speed = median(row["samples_per_second"])
        more = f"   accuracy {median(row['accuracy']):.3f}" if "accuracy" in row else ""
        report.note(
            f"{row['case']:14} {row['name']:22} {speed:11,.0f} samples/s   {_ratio(row)}{more}"
        )
