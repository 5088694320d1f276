"""Metrics against scikit-learn's, for targets of any size; and what "best" means."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import merged, some
from sklearn.metrics import (
    f1_score,
    mean_absolute_error,
    median_absolute_error,
    r2_score,
    root_mean_squared_error,
)

import jmlp
from jmlp.errors import ConfigError, DataError
from jmlp.losses import cross_entropy
from jmlp.metrics import METRICS, Metric, Sums, as_metric, better
from jmlp.optim import evaluation_params

pytestmark = pytest.mark.usefixtures("no_pictures")
REGRESSION = {
    "data": {"task": "regression", "val_fraction": 0.2},
    "mesh": {"data": 2},
    "model": {"hidden": [16]},
    "optim": {"learning_rate": 1e-2, "schedule": "constant"},
    "train": {"epochs": 5, "batch_size": 32},
}


def predicted(run, split):
    """(N, K) true and predicted targets over their scale, in float64."""
    y, outputs = split.y, run.setup.programs.outputs(run.state, split.x)
    return (np.asarray(part, np.float64) for part in (y, outputs))


def by_sklearn(run, split):
    """The metrics by scikit-learn, where the scale is not so extreme as to overflow."""
    scale = np.array(run.setup.dataset.schema.y_scale)
    true, guess = predicted(run, split)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "rmse": (root_mean_squared_error(true, guess, multioutput="raw_values") * scale).mean(),
            "mae": (mean_absolute_error(true, guess, multioutput="raw_values") * scale).mean(),
            "r2": r2_score(true, guess),
        }


@pytest.mark.parametrize(
    "unit", some([1e-300, 1e-20, 1.6e-19, 1.0, 1e18, 1e30, 1e300], 1e-300, 1e18)
)
def test_targets_of_any_size(curve, unit):
    x, y = curve
    run = jmlp.train(REGRESSION, (x, np.stack([y[:, 1], -3 * y[:, 1]], 1) * unit))
    for name in ("train", "val", "test"):
        want = by_sklearn(run, getattr(run.setup.dataset, name))
        got = run.summary[name]
        assert got["r2"] == pytest.approx(want["r2"], abs=1e-5)
        for metric in ("rmse", "mae"):
            assert got[metric] / unit == pytest.approx(want[metric] / unit, rel=1e-5)
            assert 0.01 < got[metric] / unit < 10


@pytest.mark.slow
def test_features_of_any_size(curve):
    x, y = curve
    ordinary = jmlp.train(REGRESSION, (x, y))
    for power in (-960, 960):  # of two, so that nothing is rounded
        scaled = x * np.array([1.0, 2.0**power, 2.0**-power, 1.0, 2.0**power])
        run = jmlp.train(REGRESSION, (scaled, y))
        assert run.summary["fingerprint"] == ordinary.summary["fingerprint"]


def test_errors_beyond_float32_squares_are_counted(curve):
    """Of rows that are not at all like the training rows."""
    run = jmlp.train(REGRESSION, curve)
    programs, split = run.setup.programs, run.setup.dataset.test
    for unit in (1e30, 1e-30):
        far = split._replace(y=(split.y * unit).astype(np.float32), x=split.x * 0)
        got, want = programs.evaluate(run.state, far), by_sklearn(run, far)
        if unit > 1:
            want = by_sklearn(run, far)
            assert got["rmse"] == pytest.approx(want["rmse"], rel=1e-5)
            assert got["mae"] == pytest.approx(want["mae"], rel=1e-5)
        assert got["r2"] == pytest.approx(want["r2"], rel=1e-5)


def test_constant_columns_count_as_scikit_learn_counts_them(curve, monkeypatch):
    # In batches of the size in which outputs are made: another one may round otherwise.
    monkeypatch.setattr("jmlp.programs.evaluation.LEAST_ROWS", 1024)
    monkeypatch.setattr("jmlp.programs.evaluation._FEW_ROWS", ())
    x, y = curve
    run = jmlp.train(REGRESSION, (x, np.stack([y[:, 1], np.full(len(x), 5.0)], 1)))
    split = run.setup.dataset.test
    assert run.summary["test"]["r2"] == pytest.approx(by_sklearn(run, split)["r2"], abs=1e-5)
    programs = run.setup.programs
    perfect = split._replace(y=programs.outputs(run.state, split.x))
    assert programs.evaluate(run.state, perfect)["r2"] == 1.0
    alone = split._replace(x=split.x[:1], y=split.y[:1])
    assert np.isnan(programs.evaluate(run.state, alone)["r2"])


def test_the_rmse_of_several_targets_is_the_mean_of_theirs(curve):
    run = jmlp.train(REGRESSION, curve)  # 40 and 0.7 in size
    want = by_sklearn(run, run.setup.dataset.test)["rmse"]
    assert run.summary["test"]["rmse"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "said"),
    [([3.0], "one validation row"), ([3.0, 3.0], "2 validation rows of equal targets")],
)
def test_a_monitor_that_means_nothing_is_refused(curve, values, said):
    x, y = curve
    data = {"x": x, "y": y[:, 1], "x_val": x[: len(values)], "y_val": np.array(values)}
    monitor = {"train": {"monitor": "r2", "early_stopping": 5}}
    with pytest.raises(ConfigError, match=rf"train\.monitor=r2.*{said}.*Monitor loss, rmse"):
        jmlp.train(merged(REGRESSION, monitor), data)
    few = jmlp.train(merged(REGRESSION, {"train": {"monitor": "rmse"}}), data)
    assert few.summary["best"]["rmse"] > 0


def test_a_target_beyond_float32_is_refused_by_row(curve):
    x, y = curve
    data = {"x": x, "y": y[:, 1], "x_test": x[:2], "y_test": np.array([0.0, 1e60])}
    with pytest.raises(DataError, match=r"1e\+60 is beyond float32 once scaled"):
        jmlp.train(REGRESSION, data)


def test_better_is_strictly_better_and_never_nan():
    nan, inf = float("nan"), float("inf")
    assert better("loss", 1.0, None)
    assert better("loss", 1.0, nan)  # of a run whose best was a NaN
    assert better("loss", 0.9, 1.0)
    assert better("r2", 0.9, 0.8)
    assert better("loss", 0.0, 0.1)
    for name in ("loss", "accuracy"):
        assert not better(name, 1.0, 1.0)
        for value in (nan, inf, -inf, None):
            assert not better(name, value, None)
            assert not better(name, value, 0.5)
    assert not better("loss", 1.1, 1.0)
    assert not better("accuracy", 0.9, 1.0)


# Metrics of one's own.

CLASSES = {
    "data": {"val_fraction": 0.3, "test_fraction": 0.3},
    "mesh": {"data": 4},
    "model": {"hidden": [16]},
    "train": {"epochs": 2, "batch_size": 50},
}


def macro_f1_score(y_true, outputs):
    return f1_score(y_true, outputs.argmax(1), average="macro")


def _top2_sums(batch):
    best = jnp.argsort(batch.outputs, -1)[:, -2:]
    hit = (best == batch.y[:, None]).any(-1)
    return {"top2": (batch.weight * hit)[:, None].sum(0)}


TOP2 = Metric(
    name="top2",
    sums=Sums(of_batch=_top2_sums),
    value=lambda totals, held: totals["top2"][0] / len(held.y),
    best="higher",
    tasks=("classification",),
)


ROWS = Metric(  # whose sum has the name of another's
    name="rows",
    sums=Sums(of_batch=lambda batch: {"top2": batch.weight[:, None].sum(0)}),
    value=lambda totals, held: totals["top2"][0],
)


@pytest.mark.slow
def test_ones_own_are_exact_on_ragged_batches(blobs, monkeypatch):
    """61 test rows in one padded batch of 64 and, made small, in ragged ones of 8 over 4."""
    for rows in (1024, 8):
        monkeypatch.setattr("jmlp.programs.evaluation.EVAL_ROWS", rows)
        run = jmlp.train(CLASSES, blobs, metrics=[TOP2, macro_f1_score, ROWS])
        assert list(run.summary["test"]) == ["loss", "accuracy", "top2", "macro_f1_score", "rows"]
        for name in ("train", "val", "test"):
            split = getattr(run.setup.dataset, name)
            outputs = run.setup.programs.outputs(run.state, split.x)
            hit = (np.argsort(outputs, -1)[:, -2:] == split.y[:, None]).any(1)
            assert split.rows % 8
            assert run.summary[name]["top2"] == pytest.approx(hit.mean(), abs=1e-12)
            assert run.summary[name]["rows"] == split.rows
            want = macro_f1_score(split.y, outputs)
            assert run.summary[name]["macro_f1_score"] == pytest.approx(want, abs=1e-12)


def test_a_split_is_measured_in_a_batch_of_its_own_size(blobs):
    """Of few sizes that do not depend on the mesh, before the padding to it."""
    sizes = {1: 32, 32: 32, 33: 64, 64: 64, 65: 128, 1000: 1024, 1025: 1024, 10**6: 1024}
    made = {n: jmlp.prepare(merged(CLASSES, {"mesh": {"data": n}}), blobs) for n in (1, 3)}
    found, widths = {}, {}
    for n, setup in made.items():
        programs, split = setup.programs, setup.dataset.test
        assert {rows: programs.evaluation._rows(rows) for rows in sizes} == sizes
        indices = []

        def seen(index, weight=None, indices=indices, place=programs.placement.place_index):
            indices.append(index.shape)
            return place(index, weight)

        programs.placement.place_index = seen
        state = programs.init(0)
        found[n] = programs.evaluate(state, split, programs.place(split))
        widths[n] = {shape[1] for shape in indices}
        assert programs.evaluate(state, split) == pytest.approx(found[n], abs=1e-6)  # streamed
    assert widths == {1: {64}, 3: {66}}
    assert found[1] == pytest.approx(found[3], abs=1e-6)


def test_a_reproducible_run_is_measured_in_batches_of_one_size(blobs):
    found = set()
    for n in (1, 8):
        keys = {"reproducible": True, "mesh": {"data": n}}
        setup = jmlp.prepare(merged(CLASSES, keys), blobs)
        assert setup.programs.evaluation._rows(5) == 1024
        metrics = setup.programs.evaluate(setup.programs.init(0), setup.dataset.test)
        found.add(tuple(metrics.items()))
    assert len(found) == 1


@pytest.fixture(scope="module")
def every_way(blobs, curve):
    """Task to what all metrics in the table are of the same rows, cut and ordered otherwise; and
    last what they are of few of them."""
    found = {}
    x, y = curve
    positive = (x, np.abs(y) + 0.1)  # of which every metric is defined
    for task, data in {"classification": blobs, "regression": positive}.items():
        names = [name for name, metric in METRICS.items() if task in metric.tasks]
        loss = "gamma_deviance" if task == "regression" else "auto"
        keys = {
            "model": {"hidden": [8]},
            "train": {"metrics": names, "batch_size": 50, "loss": loss},
        }
        ways = []
        with pytest.MonkeyPatch.context() as patch:
            for rows, devices, batches in ((1024, 1, 64), (8, 4, 3)):  # in one call, in several
                patch.setattr("jmlp.programs.evaluation.EVAL_ROWS", rows)
                patch.setattr("jmlp.programs.evaluation.CAPACITY", batches)
                setup = jmlp.prepare(merged(keys, {"mesh": {"data": devices}}), data)
                split, state = setup.dataset.test, setup.programs.init(0)
                assert (split.rows % 8 and split.rows > rows * batches) or devices == 1
                ways.append(setup.programs.evaluate(state, split))
            resident = setup.programs.place(split)
            ways.append(setup.programs.evaluate(state, split, resident))
            for rows in (slice(None, None, -1), slice(5)):
                part = split._replace(x=split.x[rows].copy(), y=split.y[rows].copy())
                ways.append(setup.programs.evaluate(state, part))
        found[task] = ways
    return found


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_metric_of_the_table_is_exact_on_ragged_batches(name, every_way):
    """However rows are cut into batches and batches over devices, and in whatever order."""
    assert METRICS[name].name == name
    for task in every_way.keys() & set(METRICS[name].tasks):
        *found, of_few = (way[name] for way in every_way[task])
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, found[0], rtol=1e-6)
        assert of_few != found[0]  # it is of the rows, not of a number


def test_what_is_evaluated_are_the_averaged_weights(blobs):
    """Where the optimizer keeps them, in sums over batches and in outputs alike."""
    run = jmlp.train(merged(CLASSES, {"optim": {"ema": 0.9}}), blobs, metrics=[macro_f1_score])
    programs, split, state = run.setup.programs, run.setup.dataset.test, run.state
    bare = state._replace(params=evaluation_params(state.params, state.opt_state), opt_state=())
    assert programs.evaluate(state, split) == run.summary["test"]
    found = jmlp.prepare(CLASSES, blobs).programs  # without an average
    logits = found.outputs(bare._replace(opt_state=found.init(0).opt_state), split.x)
    np.testing.assert_allclose(programs.outputs(state, split.x), logits, rtol=1e-5, atol=1e-6)
    assert run.summary["test"]["accuracy"] == pytest.approx((logits.argmax(1) == split.y).mean())
    last = found.outputs(state._replace(opt_state=found.init(0).opt_state), split.x)
    assert np.abs(last - logits).max() > 1e-3


def test_no_rows_have_no_outputs(blobs):
    setup = jmlp.prepare(CLASSES, blobs)
    outputs = setup.programs.outputs(setup.programs.init(0), setup.dataset.test.x[:0])
    assert (outputs.shape, outputs.dtype) == ((0, 3), np.float32)


def test_a_functions_name_says_which_is_better():
    def named(name):
        def function(y_true, outputs):
            return 0.0

        function.__name__ = name
        return as_metric(function)

    want = {"f1_score": "higher", "max_error": "lower", "log_loss": "lower",
            "mean_tweedie_deviance": "lower", "kappa": None, "score": None}  # fmt: skip
    assert {name: named(name).best for name in want} == want
    assert named("f1_score").name == "f1_score"
    assert as_metric(TOP2) is TOP2


def test_a_function_has_targets_in_their_own_units(curve):
    x, y = curve
    given = []

    def mean_of_targets(y_true, outputs):
        given.extend(y_true)
        return y_true.mean()

    own = [median_absolute_error, r2_score, mean_of_targets]
    run = jmlp.train(REGRESSION, (x, y[:, 0]), metrics=own)
    split, schema = run.setup.dataset.test, run.setup.dataset.schema
    outputs = run.setup.programs.outputs(run.state, split.x)
    unit, middle = schema.y_scale[0], schema.y_mean[0]
    true, guess = (part[:, 0].astype(np.float64) * unit + middle for part in (split.y, outputs))
    assert run.summary["test"]["median_absolute_error"] == pytest.approx(
        median_absolute_error(true, guess), rel=1e-9
    )
    assert run.summary["test"]["r2_score"] == pytest.approx(run.summary["test"]["r2"], abs=1e-5)
    # A difference would be the same about another middle.
    assert run.summary["test"]["mean_of_targets"] == pytest.approx(true.mean(), rel=1e-9)
    assert max(min(abs(y[:, 0] - value)) for value in given) < 1e-3


@pytest.mark.slow
def test_what_is_monitored_goes_by_its_direction(blobs, tmp_path):
    """The best step is the one with the most, or the least, and is found again."""
    for best, choose in (("higher", max), ("lower", min)):
        odd = Metric(name="odd", of_outputs=lambda y, o: float(o[0].sum()), best=best)
        keys = {"train": {"monitor": "odd", "select": "best", "epochs": 5, "keep": 1}}
        run = jmlp.train(merged(CLASSES, keys), blobs, run_dir=tmp_path / best, metrics=[odd])
        lines = (tmp_path / best / "metrics.jsonl").read_text().splitlines()
        events = [e for e in map(json.loads, lines) if e["split"] == "val"]
        want = choose(events, key=lambda event: event["odd"])
        assert run.summary["best"] == {"step": want["step"], "odd": want["odd"]}
        assert jmlp.open_run(tmp_path / best).step == want["step"]
        opened = jmlp.open_run(tmp_path / best, metrics=[odd])
        assert jmlp.evaluate(opened, blobs)["data"]["odd"] != 0


def test_by_name_in_a_config(blobs, curve, monkeypatch):
    monkeypatch.setitem(METRICS, "top2", TOP2)
    keys = {"train": {"metrics": ["top2"], "monitor": "top2"}}
    run = jmlp.train(merged(CLASSES, keys), blobs)
    assert list(run.summary["val"]) == ["loss", "top2"]
    assert "top2" in run.summary["best"]
    with pytest.raises(ConfigError, match="top2 is for classification; this is a regression"):
        jmlp.train(merged(REGRESSION, {"train": {"metrics": ["top2"]}}), curve)


def test_metrics_that_cannot_be_are_refused_by_name(blobs):
    def unknown(y_true, outputs):
        return 0.5

    def broken(y_true, outputs):
        raise ValueError("of no use")

    rows = Metric(name="rows", sums=Sums(of_batch=lambda batch: {"w": batch.weight[None]}),
                  value=lambda totals, held: 0.0)  # fmt: skip
    cases = [
        ({}, [broken], r"metric broken: of y_true \(\d+,\) and outputs .* ValueError: of no use"),
        ({}, [rows], "metric rows: its sums must be a dict of"),
        ({}, [3], r"metrics: int; expected a jmlp\.metrics\.Metric"),
        ({}, [Metric(name="loss", of_outputs=unknown)], "two are called loss"),
        ({"monitor": "unknown"}, [unknown], r"train\.monitor=unknown: is more of it better"),
        ({"monitor": "recall"}, [], r"train\.monitor=recall: classification has loss, accuracy"),
        ({"metrics": ["recall"]}, [], r"train\.metrics: 'recall' is none of"),
    ]
    for keys, metrics, said in cases:
        with pytest.raises(ConfigError, match=said):
            jmlp.train(merged(CLASSES, {"train": keys}), blobs, metrics=metrics)
    with pytest.raises(ConfigError, match="give sums and value, or of_outputs"):
        Metric(name="neither")


def test_a_run_with_a_loss_of_its_own_is_opened_without_it(blobs, tmp_path):
    def doubled(outputs, y):
        return 2 * cross_entropy(outputs, y)

    run = jmlp.train(CLASSES, blobs, run_dir=tmp_path, loss=doubled)
    plain = jmlp.evaluate(jmlp.open_run(tmp_path), blobs)["data"]
    assert list(plain) == ["accuracy"]
    whole = jmlp.evaluate(jmlp.open_run(tmp_path, loss=doubled), blobs)["data"]
    assert whole["loss"] == pytest.approx(jmlp.evaluate(run, blobs)["data"]["loss"], rel=1e-6)
