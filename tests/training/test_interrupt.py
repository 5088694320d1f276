"""Signals and threads: what a program around `jmlp.train` can rely on."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import Interrupt, own_environment, some, stopped

import jmlp
from jmlp.checkpoint.leaves import _reading
from jmlp.errors import ConfigError, RunDirError
from jmlp.report import Reporter

SMALL = {
    "mesh": {"data": 2},
    "model": {"hidden": [16]},
    "train": {"epochs": 4, "batch_size": 32, "steps_per_call": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_is_saved_and_handed_on(blobs, tmp_path, number, error, capsys):
    whole = jmlp.train(SMALL, blobs).summary
    before = signal.getsignal(number)
    with pytest.raises(error) as caught:
        jmlp.train(SMALL, blobs, run_dir=tmp_path, report=Interrupt(7, number))
    said = f"stopped at step 7 of 20; saved in {tmp_path}: the same call goes on from there"
    if error is SystemExit:
        assert caught.value.code == 143
        assert said in capsys.readouterr().err
    else:
        assert str(caught.value) == said
    assert signal.getsignal(number) == before
    assert jmlp.open_run(tmp_path).step == 7
    assert jmlp.train(SMALL, blobs, run_dir=tmp_path).summary["fingerprint"] == whole["fingerprint"]


def test_a_handler_of_ones_own_is_asked_first(blobs):
    seen = []
    old = signal.signal(signal.SIGTERM, lambda *what: seen.append(what[0]))
    try:
        with pytest.raises(SystemExit):
            jmlp.train(SMALL, blobs, report=Interrupt(3))
    finally:
        signal.signal(signal.SIGTERM, old)
    assert seen == [signal.SIGTERM]


def test_a_signal_at_the_last_step_ends_a_loop_as_well(blobs, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        jmlp.train(SMALL, blobs, run_dir=tmp_path, report=Interrupt(20, signal.SIGINT))
    assert (tmp_path / "summary.json").exists()  # the run itself was done


def test_a_signal_is_not_lost_where_the_run_fails(blobs):
    class Fails(Interrupt):
        def advance(self, step, loss, samples_per_second):
            super().advance(step, loss, samples_per_second)
            raise ConfigError("after the signal")

    with pytest.raises(KeyboardInterrupt):
        jmlp.train(SMALL, blobs, report=Fails(1, signal.SIGINT))


LOOP = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np, jmlp
from helpers import Interrupt
x = np.random.default_rng(0).normal(size=(90, 4))
for seed in range(3):
    print("training", seed, flush=True)
    jmlp.train({{"seed": seed, "train": {{"epochs": 2, "batch_size": 16}}}},
               (x, (x[:, 0] > 0).astype(int)), report=Interrupt(1, {number}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", some([signal.SIGINT, signal.SIGTERM], signal.SIGINT))
def test_a_loop_over_trainings_ends(number):
    code = LOOP.format(tests=str(Path(__file__).parents[1]), number=int(number))
    done = subprocess.run(
        [sys.executable, "-c", code], env=own_environment(), capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.stdout == "training 0\n"
    assert done.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT)


@pytest.mark.slow
def test_a_second_training_on_another_thread_is_refused(blobs, tmp_path):
    """orbax mixes up the folders of two that save at once, and collectives may never end."""
    alone = jmlp.train(SMALL, blobs).summary["fingerprint"]
    found = []

    class Another(Reporter):
        def advance(self, step, loss, samples_per_second):
            if step == 5:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()

    def second():
        try:
            jmlp.train(SMALL, blobs, run_dir=tmp_path / "second")
        except RunDirError as error:
            found.append(str(error))

    first = jmlp.train(SMALL, blobs, run_dir=tmp_path / "first", report=Another())
    assert first.summary["fingerprint"] == alone
    assert len(found) == 1
    assert "another training is running in this process" in found[0]
    assert not (tmp_path / "second").exists()
    second()  # and after it there may be another
    assert len(found) == 1
    assert (tmp_path / "second" / "summary.json").exists()


@pytest.mark.slow
def test_a_training_inside_a_training(blobs, tmp_path):
    alone = jmlp.train(SMALL, blobs).summary["fingerprint"]
    inner = []

    class Nested(Reporter):
        def advance(self, step, loss, samples_per_second):
            if step in (6, 11):  # just after a checkpoint was begun
                inner.append(jmlp.train(SMALL, blobs, run_dir=tmp_path / f"at {step}").summary)

    outer = jmlp.train(SMALL, blobs, run_dir=tmp_path / "outer", report=Nested()).summary
    assert [s["fingerprint"] for s in (outer, *inner)] == [alone] * 3
    with pytest.raises(ConfigError):
        jmlp.train(SMALL | {"mesh": {"data": 99}}, blobs)
    assert stopped(SMALL, blobs).summary["fingerprint"] == alone  # a failed one leaves no lock


def test_two_threads_that_read_leave_stderr_where_it_was():
    before, entered = sys.stderr, threading.Event()
    may_leave = threading.Event()

    def other():
        with _reading("b"):
            entered.set()
            may_leave.wait(10)

    thread = threading.Thread(target=other)
    with _reading("a"):
        thread.start()
        entered.wait(0.5)  # it must not get in
    may_leave.set()
    thread.join()
    assert sys.stderr is before
