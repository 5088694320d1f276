"""`mesh: auto`, `step: auto`: the plan for what is here, kept and compared; the command line."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest

import jmlp
from jmlp.cli.main import main
from jmlp.config import override_config, parse_config
from jmlp.errors import ConfigError
from jmlp.planner.auto import choose
from jmlp.planner.candidates import Candidates
from jmlp.planner.hardware import target
from jmlp.planner.here import here
from jmlp.planner.workload import Workload


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path):
    """What somebody has measured of this machine is not looked at."""
    monkeypatch.setenv("JMLP_HARDWARE", str(tmp_path / "measured.yaml"))
    monkeypatch.chdir(Path(__file__).parents[2])  # where configs/ lies


@pytest.fixture
def slow_cores(monkeypatch, tmp_path):
    """A machine whose devices do not share, with links that cost nothing: all are worth using."""
    text = resources.files("jmlp.planner").joinpath("kinds", "cpu.yaml").read_text()
    text = text.replace("shared: true", "shared: false").replace("value: 1e11", "value: 1e6")
    text = text.replace("value: 2e-4", "value: 1e-9").replace("value: 8.6e8", "value: 1e15")
    (tmp_path / "measured.yaml").write_text(text)


def config_of(**keys):
    return {"model": {"hidden": [16]}, "train": {"steps": 6, "batch_size": 64}} | keys


@pytest.mark.slow
def test_step_auto_is_one_device_where_cores_are_shared(blobs, tmp_path, no_pictures, capsys):
    result = jmlp.train(config_of(step="auto", mesh="auto"), blobs, run_dir=tmp_path / "run")
    assert (result.summary["step"], result.summary["devices"]) == ("single", 1)
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())
    plan = json.loads((tmp_path / "run" / "summary.json").read_text())["plan"]
    assert kept["predicted_bytes"] == plan["predicted_bytes"] and kept["measured_bytes"] is None
    assert plan["predicted_bytes"] == pytest.approx(plan["measured_bytes"], rel=0.3)
    assert 0 < plan["measured_seconds_per_step"] < 60
    assert main(["plan", "--check", str(tmp_path / "run"), "--json"]) == 0
    told = capsys.readouterr()
    row = json.loads(told.out)["runs"][0]
    assert row["step"] == "single" and row["considered"] == kept["considered"]
    first, *others = kept["considered"]
    assert (first["step"], first["mesh"], first["fits"]) == ("single", {}, True) and others
    assert f"of {len(others) + 1} ways considered" in told.err
    assert "single over one device: " in told.err
    # A run of before, which kept what it took alone.
    (tmp_path / "run" / "plan.json").write_text('{"step": "single"}')
    assert main(["plan", "--check", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["considered"] == []


def test_the_plan_follows_the_devices(slow_cores, blobs):
    setup = jmlp.prepare(config_of(step="auto", mesh="auto"), blobs)
    assert setup.config.mesh.size() == 8


def test_mesh_auto_keeps_the_step(slow_cores, blobs):
    setup = jmlp.prepare(config_of(step="pmap", mesh="auto"), blobs)
    assert setup.config.step == "pmap" and setup.config.mesh.data == 8


def test_step_auto_keeps_the_mesh():
    config = parse_config(config_of(step="auto", mesh={"data": 2, "model": 2}))
    ways = list(Candidates(config, target("h100:8")))
    assert {(way.mesh.data, way.mesh.model) for way in ways} == {(2, 2)}
    assert {way.step for way in ways} == {"sharded", "explicit"}


def test_the_same_bits_as_when_it_is_said(blobs):
    auto = jmlp.train(config_of(step="auto", mesh="auto"), blobs)
    said = jmlp.train(config_of(step="single", mesh={"data": 1}), blobs)
    assert auto.summary["fingerprint"] == said.summary["fingerprint"]
    assert "plan" not in said.summary


def test_what_auto_does_not_go_with(blobs, monkeypatch):
    with pytest.raises(ConfigError, match="leave fsdp out"):
        parse_config(config_of(mesh={"data": "planned", "fsdp": 2}))
    with pytest.raises(ConfigError, match="not a model of yours: say both, e"):
        jmlp.train(config_of(step="auto"), blobs, model=lambda rngs: None)
    with pytest.raises(ConfigError, match="are for jmlp train"):
        jmlp.MLPClassifier(step="auto", max_iter=1).fit(*blobs)
    monkeypatch.setattr("jmlp.planner.here._with_memory", lambda hardware, device: (
        hardware.model_copy(update={"memory_bytes": hardware.kernel_s})  # some bytes
    ))  # fmt: skip
    with pytest.raises(ConfigError, match="nothing fits these 8 devices"):
        jmlp.prepare(config_of(step="auto"), blobs)


def test_every_process_has_a_share_of_the_plan(blobs, monkeypatch):
    """The plan would be one device, of which other processes had no part."""
    setup = jmlp.prepare(config_of(), blobs)
    work = Workload(parse_config(config_of(step="auto", mesh="auto")), setup.dataset.schema, 400)
    assert choose(work).plans[0].devices == 1
    monkeypatch.setattr("jax.process_count", lambda: 2)
    assert {plan.devices for plan in choose(work).plans} == {8}
    lone = config_of(step="pipeline", mesh="auto", model={"hidden": []})
    with pytest.raises(ConfigError, match="no way to choose for 'pipeline' over these 8 devices"):
        choose(work._replace(config=parse_config(lone)))


def test_here_is_this_machine(slow_cores):
    found = here()
    assert found.devices == 8 and found.hardware.product_rates["float32"].value == 1e6


def test_the_command(tmp_path, capsys):
    shutil.copy("configs/digits.yaml", tmp_path / "digits.yaml")
    config = str(tmp_path / "digits.yaml")
    sizes = ["--features=64", "--outputs=10", "--rows=1000"]
    assert main(["plan", config, "--on=v5e:2x4", *sizes, "--model.norm=layer", "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["best"] == 0 and found["plans"][0]["config"]["step"] == "single"
    assert {"step", "mesh", "fits", "bytes_per_device", "seconds_per_step", "bound"} <= {
        *found["plans"][0]
    }
    assert "use one device" in told.err and "data sheet, not measured here" in told.err
    # What it says to write is a config that trains.
    best = found["plans"][0]["config"]
    keys = [f"--{key}={json.dumps(value).strip(chr(34))}" for key, value in best.items()]
    assert override_config(parse_config(config), keys).mesh.size() == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["configs/digits.yaml", "--on=h100:8", "--rows=5"], "give --features and --outputs"),
        (["configs/digits.yaml", "--on=h100:many"], "expected KIND:DEVICES"),
        (["configs/digits.yaml", "--top=0"], "--top is at least 1"),
        (["configs/csv_regression.yaml", "--on=h100:8"], "--features, --outputs and --rows"),
        ([], "expected a config"),
        (["--check", "nowhere"], "holds no finished run"),
    ],
)
def test_mistakes_of_the_command(args, said, capsys):
    assert main(["plan", *args]) == 2
    assert said in capsys.readouterr().err
