"""`jmlp bench peers`: the same training by jmlp and by what a user might pick instead.

Fashion-MNIST, the same model, batch size, optimizer and epochs, float32, on one machine.
Each peer lives in a process of its own, that waits while the others have their turn
(A B C A B C ...). The first round is thrown away, with what compiles in it; speeds are of
training alone, and the accuracy is that on the 10,000 test rows at the end of each run.
"""

from contextlib import ExitStack
from functools import partial

import numpy as np

from jmlp.analysis.rows import CaseRow, Result
from jmlp.bench.peer_loops import PEERS, WORLD, Rows, Trained
from jmlp.bench.resume import Flags, chosen, described, installed
from jmlp.bench.timing import CASES, Case, compared, interleaved, parse_cases, say
from jmlp.bench.turns import Turns, taking_turns
from jmlp.config import parse_config
from jmlp.report import Reporter

AGAINST = "jmlp"
_NEEDS = {name: ("torch", "peers") for name in PEERS if name.startswith("torch")}
_NEEDS["keras on jax"] = "keras", "peers"


def run(flags: Flags, report: Reporter) -> Result[CaseRow]:
    """The table for the command line's cases, peers and repeats."""
    cases = parse_cases(flags.cases or CASES)
    known = installed(chosen(PEERS, flags.only, always=[AGAINST]), _NEEDS, flags.only, report)
    read(cases[0])  # says what is missing before anything starts
    worlds = {name: WORLD.get(name, 1) for name in known}
    table: list[CaseRow] = []
    for case in cases:
        with ExitStack() as stack:
            peers = {
                name: stack.enter_context(taking_turns(name, partial(_trained, name, case), world))
                for name, world in worlds.items()
            }
            rows = _measure(case, peers, flags.repeats)
        say(rows, report)
        table += rows
    return described("peers", {"cases": [case.name for case in cases]}, table)


def _measure(
    case: Case, peers: dict[str, Turns[tuple[float, float]]], repeats: int
) -> list[CaseRow]:
    rows, epochs = size(case)
    accuracy: dict[str, list[float]] = {name: [] for name in peers}

    def timed(name: str, peer: Turns[tuple[float, float]]) -> float:
        answers = peer.take()  # of each process: the slowest counts
        accuracy[name].append(round(answers[0][1], 4))
        return rows * epochs / max(seconds for seconds, _ in answers)

    turns = {name: partial(timed, name, peer) for name, peer in peers.items()}
    speeds = interleaved(turns, repeats)
    table = compared(case, speeds, AGAINST)
    return [{**row, "accuracy": accuracy[row["name"]][1:], "epochs": epochs} for row in table]


def size(case: Case) -> tuple[int, int]:
    """(training rows, epochs): some seconds of work for each case."""
    if case.flops_per_sample > 10e6:
        return max(12_288, case.batch), 1
    return 60_000, 1 if case.flops_per_sample > 1e6 else 4


def read(case: Case) -> Rows:
    """Fashion-MNIST for `case`. Raises DataError where it is not found."""
    from jmlp.data.load import load

    source = {"path": "fashion-mnist", "val_fraction": 0.0}
    dataset = load(parse_config({"data": source}).data, 0)
    schema, count = dataset.schema, size(case)[0]
    assert dataset.test is not None

    def scaled(pixels: np.ndarray) -> np.ndarray:
        return ((pixels - np.float32(schema.x_mean[0])) / np.float32(schema.x_scale[0])).astype(
            np.float32
        )

    x, test_x = dataset.train.x[:count], dataset.test.x
    return Rows(x, scaled(x), dataset.train.y[:count], test_x, scaled(test_x), dataset.test.y)


def _trained(name: str, case: Case) -> Trained:
    return PEERS[name](case, read(case), size(case)[1])
