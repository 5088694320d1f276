"""What somebody at a prompt or in a notebook sees of jmlp: names, values in words, progress."""

import io
import logging
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from helpers import own_environment

import jmlp
from jmlp.distributed import forks
from jmlp.errors import JmlpError

CONFIG = {"data": {"name": "wine"}, "mesh": {"data": 2}, "train": {"epochs": 2, "batch_size": 32}}


def test_completion_shows_the_api():
    assert sorted(jmlp.__all__) == dir(jmlp)


@pytest.mark.slow
def test_values_are_told_in_a_few_lines(tmp_path):
    result = jmlp.train(CONFIG, run_dir=tmp_path / "run")
    run, setup = jmlp.open_run(tmp_path / "run"), result.setup
    values = [result, result.state, setup, setup.dataset, setup.dataset.train, run]
    values += [jmlp.predict(run, setup.dataset.train.x[:3])]
    for value in values:
        assert 20 < len(repr(value)) < 600, value
    assert f"accuracy {result.summary['test']['accuracy']:.4g}" in repr(result)
    assert "step=sharded on data=2, 8 steps of 32 rows" in repr(setup)
    assert "128 train, 14 val, 36 test rows, 13 features, 3 classes" in repr(result)
    assert "step 8" in repr(run)
    assert "3 rows; columns prediction, p_class_0, p_class_1, p_class_2" in repr(values[-1])
    stopped = result._replace(summary={"interrupted": True, "steps": 3, "of": 10})
    assert "interrupted after 3 of 10 steps" in repr(stopped)


def test_a_state_is_told_while_it_is_traced():
    state = jmlp.prepare(CONFIG).programs.init(0)
    told = []
    jax.eval_shape(lambda state: told.append(repr(state)), state)
    assert "parameters in" in told[0]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.quick("False-False", "False-None", "False-True")
@pytest.mark.parametrize("verbose", [None, True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_python_tells_of_a_run_where_somebody_looks_on(monkeypatch, verbose, terminal):
    err = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    jmlp.train(CONFIG, verbose=verbose)
    loud = terminal if verbose is None else verbose
    assert ("epoch   2.00" in err.getvalue()) == loud
    assert ("classification of target" in err.getvalue()) == loud


def test_a_notebook_is_told_below_the_cell(monkeypatch, capsys):
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    jmlp.train(CONFIG)
    told = capsys.readouterr()
    assert "epoch   2.00" in told.out
    assert not told.err


def test_decisions_about_the_data_are_logged(caplog):
    with caplog.at_level(logging.INFO, "jmlp"):
        result = jmlp.train(CONFIG, verbose=False)
    assert [r.getMessage() for r in caplog.records if r.name == "jmlp"] == list(
        result.setup.dataset.notes
    )


FORK = """
import multiprocessing, sys
import jmlp
if sys.argv[1] == "after":
    jmlp.simulate_devices(2)
    import jax
    jax.numpy.ones(3).sum().block_until_ready()
def child(told):
    try:
        if sys.argv[1] == "before":
            jmlp.simulate_devices(2)
        jmlp.train({"data": {"name": "wine"}, "mesh": {"data": 1}, "train": {"steps": 1}})
        told.put("trained")
    except jmlp.JmlpError as error:
        told.put(str(error))
context = multiprocessing.get_context("fork")
told = context.Queue()
process = context.Process(target=child, args=(told,))
process.start()
print(told.get(timeout=100))
process.join()
"""


@pytest.mark.quick("after-was forked after jax")
@pytest.mark.parametrize(("when", "said"), [("after", "was forked after jax"), ("before", "train")])
def test_a_fork_is_told_that_it_would_hang(when, said):
    done = subprocess.run(
        [sys.executable, "-c", FORK, when], env=own_environment(), capture_output=True, text=True,
        timeout=150,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_every_door_refuses_a_fork(monkeypatch, tmp_path):
    monkeypatch.setitem(forks._state, "forked", True)
    doors = [
        lambda: jmlp.train(CONFIG), lambda: jmlp.prepare(CONFIG), lambda: jmlp.open_run(tmp_path),
        lambda: jmlp.predict(tmp_path, [[1]]), lambda: jmlp.evaluate(tmp_path),
    ]  # fmt: skip
    for door in doors:
        with pytest.raises(JmlpError, match="spawn"):
            door()
