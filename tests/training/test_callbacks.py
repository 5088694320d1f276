"""Callbacks: told of every event of every run, able to end one, and harmless where they fail."""

import json

import numpy as np
import pytest
from helpers import ASYNC, Interrupt, merged, some, stopped

import jmlp
from jmlp.config import parse_config
from jmlp.errors import ConfigError, JmlpError, TrainingError
from jmlp.report import Reporter
from jmlp.training.callbacks import CALLBACKS, make_callbacks
from jmlp.training.events import read_events
from jmlp.training.hooks import EarlyStopping, Log

pytestmark = pytest.mark.usefixtures("no_pictures")
SMALL = {
    "mesh": {"data": 2},
    "model": {"hidden": [16]},
    "train": {"epochs": 4, "batch_size": 32, "steps_per_call": 2},
}  # 146 training rows: 5 steps an epoch
WAYS = {
    "single": {"step": "single", "mesh": {"data": 1}},
    "sharded": {"mesh": {"data": 2, "fsdp": 2, "model": 2}},
    "pmap": {"step": "pmap"},
    "explicit": {"step": "explicit", "comm": {"all_reduce": "ring"}},
    "pipeline": {"step": "pipeline", "mesh": {"data": 1, "pipe": 2}},
    "local": {"step": "local", "local": {"every": 2}},
    "reproducible": {"reproducible": True},
    "async": {"step": "async", "server": {"engine": "replay"}, "optim": ASYNC["optim"]},
}


class Witness(jmlp.Callback):
    """Keeps what it is told."""

    def __init__(self):
        self.seen, self.losses, self.metrics, self.summary = [], [], [], None

    def on_start(self, view):
        self.seen.append(("start", view.step, view.first_step))

    def on_compiled(self, view, program):
        self.seen.append(("compiled", view.step, bool(program.hlo)))

    def on_steps(self, view, steps):
        assert steps.rows > 0 < steps.seconds
        self.seen.append(("steps", view.step, len(steps.losses)))
        self.losses.extend(steps.losses.tolist())

    def on_evaluation(self, view, metrics):
        self.seen.append(("evaluation", view.step, tuple(metrics)))
        self.metrics.append(metrics)

    def on_checkpoint(self, view):
        self.seen.append(("checkpoint", view.step, int(view.state.step)))

    def on_end(self, view, summary):
        self.seen.append(("end", view.step, summary["interrupted"]))
        self.summary = dict(summary)

    def close(self):
        self.seen.append(("close", 0, 0))


def of_epoch(end, checkpoint=True):
    """The events of an epoch of five steps that ends with step `end`."""
    blocks = [("steps", end - 3, 2), ("steps", end - 1, 2), ("steps", end, 1)]
    more = [("checkpoint", end, end)] if checkpoint else []
    return [*blocks, ("evaluation", end, ("train", "val")), *more]


@pytest.mark.quick("async")
@pytest.mark.parametrize("way", some(WAYS, "pipeline", "async"))
def test_it_is_told_of_every_event_in_order(blobs, tmp_path, way):
    settings, witness = merged(SMALL, WAYS[way]), Witness()
    result = jmlp.train(settings, blobs, run_dir=tmp_path, callbacks=[witness])
    epochs = [event for end in (5, 10, 15, 20) for event in of_epoch(end)]
    begin = [("start", 0, 0), ("compiled", 0, way != "async")]
    assert witness.seen == [*begin, *epochs, ("end", 20, False), ("close", 0, 0)]
    assert witness.summary == result.summary
    assert len(witness.losses) == 20
    assert np.isfinite(witness.losses).all()
    logged = read_events(tmp_path)
    told = [loss for of in witness.metrics for loss in (of["train"]["loss"], of["val"]["loss"])]
    assert [event["loss"] for event in logged] == told
    # And it changes nothing.
    assert jmlp.train(settings, blobs).summary["fingerprint"] == result.summary["fingerprint"]


@pytest.mark.quick("async")
@pytest.mark.parametrize("way", ["sharded", "async"])
def test_a_resumed_run_goes_on_where_it_was(blobs, tmp_path, way):
    settings = merged(SMALL, WAYS[way])
    parts = [Witness(), Witness(), Witness()]
    call = {"data": blobs, "run_dir": tmp_path}
    stopped(settings, report=Interrupt(7), callbacks=[parts[0]], **call)
    jmlp.train(settings, callbacks=[parts[1]], **call)
    jmlp.train(settings, callbacks=[parts[2]], **call)  # a run that is done
    assert parts[0].seen[-3:] == [("checkpoint", 7, 7), ("end", 7, True), ("close", 0, 0)]
    begin = [("start", 7, 7), ("compiled", 7, way != "async"), ("steps", 9, 2), ("steps", 10, 1)]
    assert parts[1].seen[:4] == begin
    assert parts[1].seen[-2:] == [("end", 20, False), ("close", 0, 0)]
    assert parts[2].seen == [("start", 20, 20), ("end", 20, False), ("close", 0, 0)]
    whole = Witness()
    jmlp.train(settings, blobs, callbacks=[whole])
    assert parts[0].losses + parts[1].losses == whole.losses


def test_without_a_directory_there_are_no_checkpoints(blobs):
    witness = Witness()
    jmlp.train(merged(SMALL, {"data": {"val_fraction": 0}}), blobs, callbacks=[witness])
    kinds = [kind for kind, _, _ in witness.seen]
    assert "checkpoint" not in kinds
    assert next(of for kind, _, of in witness.seen if kind == "evaluation") == ("train", "test")


class StopAt(jmlp.Callback):
    """Asks for the end in `event`, once `step` steps are taken."""

    def __init__(self, event, step):
        def ask(view, *about):
            if view.step >= step:
                view.stop("enough")

        setattr(self, event, ask)


ENDS = {"on_steps": 7, "on_evaluation": 10, "on_checkpoint": 12}
STOPS = [(way, *end) for way in ("sharded", "async") for end in ENDS.items()]
STOPS += [(way, "on_steps", 7) for way in WAYS if way not in ("sharded", "async")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "event", "end"),
    some(STOPS, *STOPS[:3], ("async", "on_steps", 7)),
)
def test_it_may_stop_a_run(blobs, tmp_path, way, event, end):
    settings = merged(SMALL, WAYS[way])
    call = {"data": blobs, "run_dir": tmp_path}
    result = jmlp.train(settings, callbacks=[StopAt(event, 6)], **call)
    assert (result.summary["steps"], result.summary["stopped_early"]) == (end, True)
    assert not result.summary["interrupted"]
    assert json.loads((tmp_path / "summary.json").read_text()) == result.summary
    assert jmlp.open_run(tmp_path).step == end
    again = jmlp.train(settings, **call).summary  # it is done
    assert (again["steps"], again["fingerprint"]) == (end, result.summary["fingerprint"])


class Fails(jmlp.Callback):
    def __init__(self, event, step, error=ValueError("no such tracker")):
        def fail(view, *about):
            if view.step >= step:
                raise error

        setattr(self, event, fail)


EVENTS = {"on_start": 0, "on_compiled": 2, "on_steps": 7, "on_evaluation": 10,
          "on_checkpoint": 12, "on_end": 20}  # fmt: skip


@pytest.fixture(scope="module")
def whole(blobs):
    """The summary of a run that nothing disturbs."""
    return jmlp.train(SMALL, blobs).summary


@pytest.mark.quick("on_compiled")
@pytest.mark.parametrize("event", EVENTS)
def test_one_that_fails_is_named_and_loses_nothing(blobs, whole, tmp_path, event):
    at, witness = EVENTS[event], Witness()
    step = 0 if event in ("on_start", "on_compiled") else 6
    call = {"data": blobs, "run_dir": tmp_path}
    with pytest.raises(TrainingError) as caught:
        jmlp.train(SMALL, callbacks=[Fails(event, step), witness], **call)
    said = str(caught.value)
    assert f"callback Fails failed in {event}: ValueError: no such tracker" in said
    assert "(test_callbacks.py, line " in said
    assert "The same call goes on from there" in said
    assert isinstance(caught.value.__cause__, ValueError)
    assert witness.seen[-1] == ("close", 0, 0)
    if at:
        assert f"The last good checkpoint is step {at}: " in said
        assert jmlp.open_run(tmp_path).step == at
        assert [e for e in witness.seen if e[0] == "checkpoint"][-1] == ("checkpoint", at, at)
    else:
        assert "No checkpoint was written" in said
    rest = jmlp.train(SMALL, **call).summary
    assert rest["fingerprint"] == whole["fingerprint"]
    steps = [event["step"] for event in read_events(tmp_path) if event["split"] == "val"]
    assert steps == [5, 10, 15, 20]


@pytest.mark.slow
@pytest.mark.parametrize("way", some(["pipeline", "local", "async"], "local"))
def test_one_that_fails_in_every_kind_of_run(blobs, tmp_path, way):
    settings = merged(SMALL, WAYS[way])
    with pytest.raises(TrainingError, match=r"failed in on_steps.* checkpoint is step 7"):
        jmlp.train(settings, blobs, run_dir=tmp_path, callbacks=[Fails("on_steps", 6)])
    assert jmlp.train(settings, blobs, run_dir=tmp_path).summary["steps"] == 20


def test_without_a_directory_a_failure_says_that_nothing_is_kept(blobs):
    with pytest.raises(TrainingError, match="Nothing is kept without a run_dir"):
        jmlp.train(SMALL, blobs, callbacks=[Fails("on_steps", 3)])


def test_errors_on_purpose_at_the_start_are_raised_as_they_are(blobs):
    with pytest.raises(ConfigError, match=r"^set WANDB_KEY$"):
        jmlp.train(SMALL, blobs, callbacks=[Fails("on_start", 0, ConfigError("set WANDB_KEY"))])


class Warned(Reporter):
    def __init__(self):
        super().__init__()
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


def test_an_optional_one_that_fails_is_one_warning(blobs):
    class Picture(Fails):
        name, optional = "picture.png", True

    report = Warned()
    summary = jmlp.train(SMALL, blobs, report=report, callbacks=[Picture("on_steps", 3)]).summary
    assert summary["steps"] == 20
    assert report.warnings == [
        "picture.png: ValueError: no such tracker; the run goes on without it"
    ]
    with pytest.raises(TrainingError, match=r"picture\.png failed in on_steps: JmlpError: no"):
        jmlp.train(SMALL, blobs, callbacks=[Picture("on_steps", 3, JmlpError("no"))])


def test_by_name_from_a_config_and_from_python(blobs, tmp_path, monkeypatch):
    made = []
    monkeypatch.setitem(CALLBACKS, "witness", lambda: made.append(Witness()) or made[-1])
    monkeypatch.setitem(CALLBACKS, "another", Witness)
    settings = merged(SMALL, {"train": {"callbacks": "witness, another"}})
    jmlp.train(settings, blobs, run_dir=tmp_path, callbacks=["witness"])
    assert len(made) == 1  # though named twice
    assert made[0].seen[-2] == ("end", 20, False)
    assert "witness" in (tmp_path / "config.yaml").read_text()
    # Without them the run can be read, and gone on with.
    monkeypatch.undo()
    assert jmlp.open_run(tmp_path).step == 20
    assert jmlp.train(SMALL, blobs, run_dir=tmp_path).summary["steps"] == 20


@pytest.mark.parametrize("name", some(sorted(CALLBACKS), "log"))
def test_every_callback_of_the_table_changes_nothing(blobs, whole, tmp_path, name):
    """Of a run from its first step, and of one that is done."""
    patience = {"early_stopping": 100} if name == "early_stopping" else {}
    named = merged(SMALL, {"train": {"callbacks": [name], **patience}})
    for _ in range(2):
        summary = jmlp.train(named, blobs, run_dir=tmp_path).summary
        assert summary["fingerprint"] == whole["fingerprint"]
        assert summary["val"] == whole["val"]
        assert (summary["steps"], summary["stopped_early"]) == (20, False)
    assert len(read_events(tmp_path)) == 8  # four of train and four of val


def test_what_is_no_callback_is_refused(blobs):
    with pytest.raises(ConfigError, match=r"train\.callbacks.*'curve' is none of console, wire"):
        parse_config({"train": {"callbacks": ["curve"]}})
    for wrong, said in (
        ("curve", "callback 'curve': there are console"),
        (Witness, r"expected an instance: Witness\(\)"),
        (print, "expected a jmlp.Callback, or a name: console"),
    ):
        with pytest.raises(ConfigError, match=said):
            jmlp.train(SMALL, blobs, callbacks=[wrong])


def test_jmlps_own_are_lines_of_the_table(blobs, tmp_path, monkeypatch):
    config = parse_config(merged(SMALL, {"train": {"early_stopping": 2, "tensorboard": True}}))
    monkeypatch.delitem(CALLBACKS, "wandb")  # which only a config names
    monkeypatch.delitem(CALLBACKS, "mlflow")
    own = make_callbacks(config, kept=True, show_wire=True)
    assert len(own) == len(CALLBACKS)
    assert len(make_callbacks(parse_config(SMALL), kept=False)) == 1  # the console
    assert len(make_callbacks(config, kept=False)) == 2  # and early stopping
    witness = Witness()
    monkeypatch.setitem(CALLBACKS, "log", lambda: witness)
    monkeypatch.setitem(CALLBACKS, "curves", jmlp.Callback)
    jmlp.train(SMALL, blobs, run_dir=tmp_path)
    assert witness.seen[-2] == ("end", 20, False)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.slow
def test_order_own_before_the_configs_before_the_calls(blobs, tmp_path, monkeypatch):
    seen = []

    class First(Log):
        def on_evaluation(self, view, metrics):
            seen.append("log")

    class Named(jmlp.Callback):
        label = "config"

        def on_evaluation(self, view, metrics):
            seen.append(self.label)

        def close(self):
            seen.append(f"{self.label} closed")

    class Given(Named):
        label = "call"

    monkeypatch.setitem(CALLBACKS, "log", First)
    monkeypatch.setitem(CALLBACKS, "named", Named)
    once = merged(SMALL, {"train": {"epochs": 1, "callbacks": ["named"]}})
    jmlp.train(once, blobs, run_dir=tmp_path, callbacks=[Given()])
    assert seen == ["log", "config", "call", "call closed", "config closed"]


def test_early_stopping_of_ones_own_patience(blobs, tmp_path):
    settings = merged(SMALL, {"optim": {"name": "sgd", "learning_rate": 1e-30}})
    result = jmlp.train(settings, blobs, run_dir=tmp_path, callbacks=[EarlyStopping(2)])
    assert result.summary["stopped_early"]
    assert result.summary["steps"] == 15  # the first was the best, and two were not better


def test_a_view_cannot_be_changed_and_says_where_the_run_is(blobs, tmp_path):
    class Looks(jmlp.Callback):
        def on_evaluation(self, view, metrics):
            assert (view.epoch, view.total, view.run_dir) == (view.step / 5, 20, tmp_path)
            assert view.best.step == 5 * int(np.argmin([*self.losses, metrics["val"]["loss"]]) + 1)
            self.losses.append(metrics["val"]["loss"])
            assert view.config is view.setup.config
            assert view.samples_per_second > 0 < view.seconds
            logits = view.setup.programs.outputs(view.state, view.setup.dataset.val.x)
            hits = (logits.argmax(1) == view.setup.dataset.val.y).mean()
            assert hits == pytest.approx(metrics["val"]["accuracy"])
            with pytest.raises(AttributeError):
                view.step = 3

    looks = Looks()
    looks.losses = []
    jmlp.train(SMALL, blobs, run_dir=tmp_path, callbacks=[looks])
    assert len(looks.losses) == 4
