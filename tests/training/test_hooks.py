"""The callbacks that jmlp brings, one event at a time: no run is needed to tell them of one."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jmlp.errors import ConfigError
from jmlp.programs.collectives import Wire
from jmlp.report import Reporter
from jmlp.training.callbacks import AtEnd, Best, Callback, Compiled, RunView, Steps, known_names
from jmlp.training.events import append_event, read_events
from jmlp.training.hooks import Console, EarlyStopping, Log, TensorBoard, WireTable

METRICS = {"train": {"loss": 2.0}, "val": {"loss": 1.0, "accuracy": 0.5}}


class Said(Reporter):
    """Keeps what a person would see."""

    def __init__(self):
        super().__init__()
        self.said: list[Any] = []

    def note(self, text):
        self.said.append(text)

    def warn(self, text):
        self.said.append(("warning", text))

    def table(self, table):
        self.said.append(table)

    def event(self, *what):
        self.said.append(what)

    def advance(self, *what):
        self.said.append(what)

    @contextmanager
    def progress(self, step, total):
        self.said.append(("bar", step, total))
        yield
        self.said.append("bar ended")


def view_of(run_dir=None, step=7, total=20, since=0, early_stopping=None, **counters):
    train = SimpleNamespace(early_stopping=early_stopping, monitor="loss")
    setup: Any = SimpleNamespace(
        plan=SimpleNamespace(total=total, per_epoch=5), config=SimpleNamespace(train=train)
    )
    state: Any = None
    return RunView(
        setup=setup, state=state, step=step, first_step=0, run_dir=run_dir, report=Said(),
        best=Best(1.0, 5, since), seconds=3.0, samples_per_second=99.96, counters=counters,
    )  # fmt: skip


def said(view):
    return view.report.said


def test_a_view_says_where_a_run_is():
    view = view_of(step=7)
    assert (view.epoch, view.total) == (1.4, 20)
    assert view_of(step=1).epoch == 0.2
    view.stop("one")
    view.stop("two")
    assert view._asked == ["one", "two"]


# console


def test_the_console_shows_what_is_held_out():
    view = view_of()
    Console().on_evaluation(view, METRICS)
    assert said(view) == [(7, 1.4, 2.0, "val", METRICS["val"])]
    for metrics, split in ({"train": {"loss": 2.0}}, None), (
        {"train": {"loss": 2.0}, "test": {"loss": 3.0}}, "test",
    ):  # fmt: skip
        view = view_of()
        Console().on_evaluation(view, metrics)
        assert said(view) == [(7, 1.4, 2.0, split, metrics.get(split, {}))]


def test_the_console_has_a_bar_where_steps_are_left():
    for step, bar in ((20, []), (7, [("bar", 7, 20), "bar ended"])):
        view, console = view_of(step=step), Console()
        console.on_start(view)
        console.on_end(view, {})
        console.close()
        assert said(view) == bar


def test_the_console_shows_the_last_loss_and_rows_a_second():
    view = view_of()
    Console().on_steps(view, Steps(np.float32([4, 3, 2]), 96, 0.5))
    assert said(view) == [(7, 2.0, 192.0)]
    Console().on_steps(view, Steps(np.float32([4]), 1, 0.0))  # of a clock that is coarse
    assert np.isfinite(said(view)[-1]).all()


def compiled(rows=(), warnings=(), hlo="HloModule"):
    wire: Any = Wire(None, list(rows), list(warnings))
    return Compiled(hlo, wire, 1.26)


def test_the_console_says_what_is_compiled():
    for hlo, text in ("HloModule", "compiled in 1.3 s"), ("", "each worker compiles its part"):
        view = view_of()
        Console().on_compiled(view, compiled(hlo=hlo))
        assert text in said(view)[0]


# wire


def row(**other):
    base = {"kind": "all-reduce", "dtype": "f32", "asked_for": "f32", "shape": "(10,)"}
    return base | {"group": 4, "times": 1, "messages": 24, "bytes": 1000.4} | other


def test_the_wire_table_adds_up_its_rows():
    rows = [row(), row(kind="all-gather", dtype="f32", asked_for="bf16", bytes=2000.4)]
    view = view_of()
    WireTable().on_compiled(view, compiled(rows, ["widened"]))
    table, total, warning = said(view)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["all-reduce", "all-gather"]
    assert columns[1] == ["f32", "f32 (asked: bf16)"]
    assert [*columns[3:]] == [["4", "4"], ["1", "1"], ["24", "24"], ["1,000", "2,000"]]
    assert total.startswith("3,001 bytes a step")
    assert warning == ("warning", "widened")


def test_the_wire_table_says_why_it_is_empty():
    for program, text in (
        (compiled(), "a step sends nothing"),
        (compiled(hlo=""), "sends messages, not collectives"),
    ):
        view = view_of()
        WireTable().on_compiled(view, program)
        (note,) = said(view)
        assert text in note


# log and tensorboard


def test_the_log_forgets_what_is_taken_again_and_appends(tmp_path):
    for step in (5, 10, 15):
        append_event(tmp_path, {"step": step, "split": "val"})
    log = Log()
    log.on_start(view_of(tmp_path, step=10))
    assert [event["step"] for event in read_events(tmp_path)] == [5, 10]
    log.on_evaluation(view_of(tmp_path, step=15, updates=3.0), METRICS)
    train, val = read_events(tmp_path)[2:]
    times = {"epoch": 3.0, "samples_per_second": 100.0, "seconds": 3.0, "updates": 3.0}
    assert train == {"step": 15, "split": "train", "loss": 2.0} | times
    assert val == {"step": 15, "split": "val", "loss": 1.0, "accuracy": 0.5} | times
    bare = view_of(None)
    log.on_start(bare)
    log.on_evaluation(bare, METRICS)


def test_tensorboard_has_each_number_at_its_step(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step=None):
            written.extend([folder, purge_step])

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            written.append("flushed")

        def close(self):
            written.append("closed")

    monkeypatch.setattr("tensorboardX.SummaryWriter", Writer)
    board = TensorBoard()
    board.on_evaluation(view_of(tmp_path), METRICS)  # it has not begun
    board.close()
    assert not written
    board.on_start(view_of(None))
    assert not written
    board.on_start(view_of(tmp_path))
    board.on_evaluation(view_of(tmp_path), METRICS)
    board.close()
    speed = ("samples_per_second", 100.0, 7)
    numbers = [
        ("train/loss", 2.0, 7), ("train/" + speed[0], *speed[1:]),
        ("val/loss", 1.0, 7), ("val/accuracy", 0.5, 7), ("val/" + speed[0], *speed[1:]),
    ]  # fmt: skip
    # Of a run that goes on: what was logged after its checkpoint does not stand there twice.
    assert written == [str(tmp_path / "tensorboard"), 8, *numbers, "flushed", "closed"]
    del written[:]
    board.on_start(view_of(tmp_path, step=0))
    assert written[1] is None


def test_tensorboard_that_is_not_there_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install 'jmlp\[tensorboard\]'"):
        TensorBoard().on_start(view_of(tmp_path))


# early stopping


@pytest.mark.parametrize(
    ("own", "config", "since", "stops"),
    [(None, 3, 2, False), (None, 3, 3, True),
     (2, None, 1, False), (2, None, 2, True), (2, 5, 3, True), (5, 2, 3, False)],
)  # fmt: skip
def test_early_stopping_waits_for_as_many_evaluations_as_it_is_told(own, config, since, stops):
    view = view_of(since=since, early_stopping=config)
    EarlyStopping(own).on_evaluation(view, METRICS)
    assert bool(view._asked) == stops
    if stops:
        assert view._asked == [f"no better val loss in {own or config} evaluations"]
    unheld = view_of(since=since, early_stopping=config)
    EarlyStopping(own).on_evaluation(unheld, {"train": {"loss": 1.0}})
    assert not unheld._asked


def test_early_stopping_that_would_never_stop_is_refused():
    with pytest.raises(ConfigError, match="after how many evaluations"):
        EarlyStopping().on_start(view_of())
    view = view_of()
    view.setup.dataset = SimpleNamespace(val=None)
    with pytest.raises(ConfigError, match="needs validation rows"):
        EarlyStopping(3).on_start(view)


# what is loaded at the end


class Ends(Callback):
    ended: list[int] = []

    def on_end(self, view, summary):
        self.ended.append(view.step)


def absent():
    raise ConfigError("pictures need matplotlib")


def test_what_is_loaded_for_the_end_is_told_of_it_where_the_run_is_done(monkeypatch):
    monkeypatch.setattr(Ends, "ended", [])
    callback, view = AtEnd(f"{__name__}:Ends", "ends"), view_of()
    callback.on_end(view, {"interrupted": True})
    assert not Ends.ended
    callback.on_end(view, {"interrupted": False})
    assert Ends.ended == [7]
    assert not said(view)
    AtEnd(f"{__name__}:absent", "picture.png").on_end(view, {"interrupted": False})
    assert said(view) == ["picture.png left out: pictures need matplotlib"]


def test_names_that_are_gone_are_left_out():
    assert known_names(["log", "gone", "curves"]) == ("log", "curves")
