"""A model in another format predicts from raw rows what the run does; or nothing is written."""

import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from helpers import config_of, merged, some

import jmlp
from jmlp.cli.main import main
from jmlp.config.sections import DataConfig
from jmlp.data.load import load
from jmlp.errors import ConfigError, DataError, ExportError
from jmlp.export import onnx_columns, onnx_model
from jmlp.export.onnx_graph import Graph
from jmlp.export.onnx_model import ACTIVATIONS_AS_NODES, UNKNOWN
from jmlp.export.run import export_run
from jmlp.export.stablehlo import program_of
from jmlp.losses import LOSSES
from jmlp.model import ACTIVATIONS

onnxruntime = pytest.importorskip("onnxruntime")
safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.usefixtures("no_pictures")

DIGITS = {"data": {"name": "digits"}, "train": {"epochs": 1}}
SHAPES = {
    "embedded": {"embed_above": 4},
    "gated": {"activation": "swiglu", "norm": "rms", "residual": True},
    "layer": {"activation": "gelu", "norm": "layer", "dropout": 0.1},
    "batch": {"activation": "silu", "norm": "batch", "residual": True},
    "linear": {"hidden": []},
    "bins": {"number_embedding": {"name": "piecewise_linear", "bins": 6}, "activation": "mish"},
    "raw bins": {"number_embedding": {"name": "piecewise_linear", "bins": 6, "size": None}},
    "waves": {"number_embedding": "periodic", "smooth_clip": 2.0, "front_scale": True},
    "realmlp": {"recipe": "realmlp", "residual": True},
    "tabm": {"recipe": "tabm", "members": 3, "residual": True},
    "linear members": {"hidden": [], "block": "ensemble", "members": 3},
}
TARGETS = {
    "classes": ("sort", {}),
    "binary": ("sort", {"loss": "binary_cross_entropy"}),
    "numbers": (["price", "days"], {}),
    "quantiles": (["price", "days"], {"loss": {"name": "quantile", "quantiles": [0.2, 0.4, 0.9]}}),
    "gaussian": ("price", {"loss": "gaussian"}),
    "poisson": ("days", {"loss": "poisson_deviance"}),
    "labels": (["hot", "wet"], {"loss": "multilabel_cross_entropy"}),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A CSV file with every kind of column, and gaps in each."""
    rng, n = np.random.default_rng(0), 240
    rows = pd.DataFrame({
        "size": rng.normal(size=n) * 3 + 1e4,
        "town": rng.choice(["Oslo", "Rome", 'the "Hague", NL'], n),
        "street": rng.choice([f"street {i}" for i in range(9)], n),
        "garden": rng.choice(["yes", "no"], n),
        "built": pd.to_datetime("1969-02-01")
        + pd.to_timedelta(rng.integers(0, 2_000_000_000, n), unit="s"),
        "zone": rng.integers(1, 6, n),
    })  # fmt: skip
    large = rows["size"] > 1e4
    rows["sort"] = np.where(large, "manor", "hut")
    rows["price"] = rows["size"] * 2 + rng.normal(size=n)
    rows["days"] = rng.poisson(4, n)
    rows["hot"], rows["wet"] = rng.integers(0, 2, n), large.astype(int)
    for every, name in enumerate(["size", "town", "street", "garden", "built"], 5):
        rows[name] = rows[name].astype(object).mask(np.arange(n) % every == 0)
    path = tmp_path_factory.mktemp("table") / "homes.csv"
    rows.to_csv(path, index=False)
    return path


def trained(table, target, model, data=None, **train):
    names = [target] if isinstance(target, str) else target
    others = {"sort", "price", "days", "hot", "wet"} - set(names)
    source = {"path": str(table), "target": names, "exclude": sorted(others)}
    source["columns"] = {"zone": "category"}
    source["task"] = "classification" if target == "sort" else "regression"
    settings = {"data": merged(source, data or {}), "model": merged({"hidden": [16, 16]}, model)}
    return jmlp.train(merged(settings, {"train": {"epochs": 2, **train}}), verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", some(TARGETS, "classes"))
def test_every_task_from_raw_columns(table, tmp_path, kind):
    target, train = TARGETS[kind]
    run = trained(table, target, SHAPES["embedded"], **train)
    for name in ("onnx", "stablehlo"):
        made = export_run(run, name, tmp_path / name)
        assert made.rows == 240 and 0 < made.difference < 1e-5, made


@pytest.mark.quick("numbers")
@pytest.mark.parametrize("kind", TARGETS)
def test_members_of_every_task_are_one_model(table, tmp_path, kind):
    target, train = TARGETS[kind]
    run = trained(table, target, {"block": "ensemble", "members": 3}, **train)
    for name in ("onnx", "stablehlo"):
        assert export_run(run, name, tmp_path / name).difference < 1e-5


@pytest.mark.quick("table-quantile")
@pytest.mark.parametrize("scale", ["robust", "quantile"])
@pytest.mark.parametrize("source", ["table", "matrix"])
def test_every_scale(table, tmp_path, scale, source):
    if source == "table":
        run = trained(table, "price", {}, data={"scale": scale}, clip_predictions=True)
    else:
        config = {"data": {"name": "wine", "scale": scale}, "train": {"epochs": 2}}
        run = jmlp.train(config, verbose=False)
    for name in ("onnx", "stablehlo"):
        assert export_run(run, name, tmp_path / name).difference < 2e-5


@pytest.mark.quick("linear")
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_model(table, tmp_path, shape):
    run = trained(table, "sort", SHAPES[shape])
    assert export_run(run, "onnx", tmp_path / "m.onnx").difference < 1e-5
    assert export_run(run, "stablehlo", tmp_path / "m.hlo").difference < 1e-5


def test_every_activation_of_the_table_has_a_node():
    assert set(ACTIVATIONS) <= set(ACTIVATIONS_AS_NODES)


def feeds(session, frame):
    kinds = {"tensor(string)": object, "tensor(float)": np.float32, "tensor(double)": np.float64}
    given = {}
    for one in session.get_inputs():
        column = frame[one.name]
        if one.name == "built":
            column = (pd.to_datetime(column) - pd.Timestamp(0)) / pd.Timedelta(seconds=1)
        if one.name == "garden":
            column = column.map({"yes": 1.0, "no": 0.0})
        column = column.fillna("") if one.type == "tensor(string)" else column
        given[one.name] = column.to_numpy(kinds[one.type])[:, None]
    return given


def test_a_graph_is_fed_columns_by_name(table, tmp_path):
    """As somebody without jmlp does: names and types are those of the graph."""
    run = trained(table, "sort", SHAPES["embedded"])
    export_run(run, "onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert {one.name for one in session.get_outputs()} == {"prediction", "probabilities"}
    frame = pd.read_csv(table)
    frame.loc[3, "town"] = "Paris"  # which training has not seen
    label, chance = session.run(["prediction", "probabilities"], feeds(session, frame))
    frame.to_csv(tmp_path / "rows.csv", index=False)
    want = run.predict(tmp_path / "rows.csv").columns
    np.testing.assert_allclose(chance[:, 0], want["p_hut"], atol=1e-5)
    assert label.tolist() == want["prediction"].tolist()


def test_rows_that_cannot_be_predicted_are_not(table, tmp_path):
    run = trained(table, "hot", {}, data={"task": "classification", "missing": "drop"})
    export_run(run, "onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    label, chance = session.run(None, feeds(session, pd.read_csv(table)))
    want = run.predict(table).columns
    np.testing.assert_allclose(chance[:, 1], want["p_1"], atol=1e-5)
    bad = np.isnan(want["p_1"])
    assert 20 < bad.sum() < 200
    assert (label[bad] == UNKNOWN).all() and set(label[~bad]) <= {0, 1}


def test_what_predict_refuses_is_unknown(tmp_path):
    """Infinite codes and ranks, and numbers beyond float32: of columns, and of a matrix."""
    rng, n = np.random.default_rng(0), 120
    frame = pd.DataFrame({
        "zip": np.arange(n) % 4 * 1.0, "small": rng.normal(size=n) * 1e-3, "y": rng.normal(size=n),
        "town": rng.choice(["Oslo", "Rome"], n),
    })  # fmt: skip
    frame.to_csv(tmp_path / "t.csv", index=False)
    keys = {"model": {"hidden": [4]}, "train": {"epochs": 1}}
    data = {"path": str(tmp_path / "t.csv"), "target": "y"}
    run = jmlp.train(keys | {"data": data})
    assert run.setup.dataset.schema.columns[0].kind == "category"
    export_run(run, "onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for name, odd in (("zip", np.inf), ("small", np.inf), ("small", 1e37)):
        rows = frame[:4].assign(**{name: [odd, *frame[name][1:4]]})
        (made,) = session.run(None, feeds(session, rows))
        assert np.isnan(made[:, 0]).tolist() == [True, False, False, False]
        with pytest.raises(DataError, match=f"column '{name}'"):
            run.predict(rows)
    ranks = load(DataConfig(target="y", scale="quantile"), 0, frame[["small", "y"]]).schema
    program = program_of(Same(), ranks, LOSSES["squared_error"])
    made = program(jnp.array([[np.inf], [0.0]], jnp.float32))["prediction"]
    assert np.isnan(made[:, 0]).tolist() == [True, False]
    called = frame.rename(columns={"small": "prediction"})
    with pytest.raises(ConfigError, match=r"column 'prediction'.*output is called so"):
        onnx_columns.prepared(Graph(), load(DataConfig(target="y"), 0, called).schema)


class Same(nnx.Module):
    def __call__(self, x):
        return x


def test_months_weekdays_and_hours_of_two_thousand_years(tmp_path):
    days = np.arange(-365_000, 365_000, 97)
    seconds = days * 86_400.0 + (days % 24) * 3600
    from jmlp.data.columns.column import PARTS, part_of
    from jmlp.export.onnx_columns import _part
    from jmlp.export.onnx_graph import Graph

    graph = Graph()
    x = graph.input("x", np.float64, ["rows", 1])
    parts = {part: (_part(graph, x, part), np.float64, ["rows", 1]) for part in PARTS}
    session = onnxruntime.InferenceSession(graph.bytes(parts, ""))
    for part, got in zip(PARTS, session.run(list(PARTS), {"x": seconds[:, None]}), strict=True):
        np.testing.assert_array_equal(got[:, 0], part_of(seconds, part), err_msg=part)


def test_a_matrix_of_numbers_is_one_input(tmp_path):
    run = jmlp.train({"data": {"name": "breast_cancer"}, "train": {"epochs": 1}})
    assert export_run(run, "onnx", tmp_path / "m.onnx").rows == 569
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (x,) = session.get_inputs()
    assert (x.name, x.shape) == ("x", ["rows", 30])
    rows = np.ones((3, 30), np.float32)
    for odd in (np.nan, np.inf, 3e38):  # beyond float32, once over a deviation of 0.014
        rows[1, 4] = odd
        label, chance = session.run(None, {"x": rows})
        assert np.isnan(chance[1]).all() and label[1] == ""
    assert [len(value) for value in session.run(None, {"x": rows[:0]})] == [0, 0]
    want = run.predict(rows[[0, 2]]).columns
    assert label[[0, 2]].tolist() == want["prediction"].tolist()
    np.testing.assert_allclose(chance[[0, 2], 1], [*want.values()][2], atol=1e-5)


def test_pixels_and_any_model_are_a_program_of_xla(tmp_path):
    run = jmlp.train(DIGITS)
    made = export_run(run, "stablehlo", tmp_path / "m")
    assert made.rows == 1000 and made.difference < 1e-5
    program = jax.export.deserialize(bytearray((tmp_path / "m").read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    x = np.full((2, 64), 7.0, np.float32)
    x[1, 0] = np.nan
    found = program.call(jnp.asarray(x))
    assert found["prediction"].shape == (2,) and found["prediction"][1] == -1
    assert np.isnan(found["probabilities"][1]).all()
    assert export_run(run, "onnx", tmp_path / "m.onnx").difference < 1e-5


def test_weights_are_named_and_laid_out_as_torch_does(tmp_path):
    run = jmlp.train(DIGITS)
    export_run(run, "safetensors", tmp_path / "m.safetensors")
    got = safetensors.load_file(tmp_path / "m.safetensors")
    split = run.setup.dataset.train
    x = np.asarray(run.setup.programs.placement.scale(jnp.asarray(split.x[:50])))
    for layer in range(len(run.setup.config.model.hidden)):
        linear = got[f"blocks.{layer}.linear.weight"], got[f"blocks.{layer}.linear.bias"]
        x = np.maximum(x @ linear[0].T + linear[1], 0)
    outputs = x @ got["head.weight"].T + got["head.bias"]
    want = run.setup.programs.outputs(run.state, split.x[:50])
    np.testing.assert_allclose(outputs, want, atol=1e-4)


@pytest.mark.parametrize("own_names", [False, True])
def test_weights_come_back(tmp_path, own_names):
    """Under the names that were written, or a hand-written network's: layers in order."""
    run = jmlp.train(DIGITS)
    path = tmp_path / "m.safetensors"
    export_run(run, "safetensors", path)
    if own_names:
        given = safetensors.load_file(path)
        layers = [
            *(f"blocks.{i}.linear" for i in range(len(run.setup.config.model.hidden))),
            "head",
        ]
        own = {f"net.{9 + i}": layer for i, layer in enumerate(layers)}  # 10 comes after 9
        parts = ("weight", "bias")
        given = {f"{at}.{part}": given[f"{own[at]}.{part}"] for at in own for part in parts}
        safetensors.save_file(given, path)
    other = {"seed": 9, "train": {"init_from": str(path), "freeze": ["."]}}
    back = jmlp.train(merged(DIGITS, other))
    same = jax.tree.map(np.array_equal, run.state.params, back.state.params)
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
def test_mistakes_are_named_and_write_nothing(table, tmp_path, blobs, monkeypatch, capsys):
    run = jmlp.train(config_of({"train": {"epochs": 1}}), blobs)
    out = tmp_path / "m.onnx"
    with pytest.raises(ConfigError, match="--rows FILE"):
        export_run(run, "onnx", out)
    with pytest.raises(ConfigError, match=r"folder .* does not exist"):
        export_run(run, "safetensors", tmp_path / "none" / "m")
    with pytest.raises(ConfigError, match="expected onnx, stablehlo or safetensors"):
        export_run(run, "onxx", out)
    other = tmp_path / "none.safetensors"
    safetensors.save_file({"a": np.zeros(3, np.float32)}, other)
    keys = {"train": {"epochs": 1, "init_from": str(other)}}
    with pytest.raises(ConfigError, match="nor as many linear layers"):
        jmlp.train(config_of(keys), blobs)
    other.write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match="is no safetensors file"):
        jmlp.train(config_of(keys), blobs)
    homes = trained(table, "sort", {})
    with pytest.raises(DataError, match="--rows FILE"):
        export_run(homes, "onnx", out, rows=str(tmp_path / "none.csv"))
    wrong = lambda graph, z: graph.add("Tanh", z)  # noqa: E731
    monkeypatch.setitem(onnx_model.ACTIVATIONS_AS_NODES, "relu", wrong)
    with pytest.raises(ExportError, match=r"homes.csv line \d+: probabilities is .* Nothing was"):
        export_run(homes, "onnx", out)
    monkeypatch.delitem(onnx_model.ACTIVATIONS_AS_NODES, "relu")
    with pytest.raises(ConfigError, match="no node for relu; export with --format stablehlo"):
        export_run(homes, "onnx", out)
    assert not out.exists() and not list(tmp_path.glob(".m*"))


@pytest.mark.slow
def test_the_command(table, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "--data.target=sort", "--data.exclude=price", "--train.epochs=1", "--run-dir=run"
    assert main(["train", str(table), *names]) == 0
    capsys.readouterr()
    assert main(["export", "run", "--format=onnx", "--out=m.onnx", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["format"] == "onnx" and found["rows"] == 240 and found["difference"] < 1e-5
    assert "on 240 rows it predicts what the run does" in said.err
    assert found["bytes"] == (tmp_path / "m.onnx").stat().st_size
    assert main(["export", "none", "--format=onnx", "--out=n.onnx"]) == 2
