"""Pictures: they hold the numbers that they were given, can be read, and are saved whole."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ASYNC, merged

import jmlp
from jmlp import plots
from jmlp.analysis import memory
from jmlp.analysis.messages import rounds_of
from jmlp.cli.main import main
from jmlp.comm import ALL_REDUCE, cost
from jmlp.errors import ConfigError
from jmlp.parallel.pipeline_stages import Schedule
from jmlp.plots import style
from jmlp.plots.bench import DRAWN
from jmlp.report import Reporter
from jmlp.training.run_dir import read_events

DOCS = Path(__file__).parents[2] / "docs"
SMALL = {"model": {"hidden": [16, 8]}, "train": {"epochs": 3, "batch_size": 32}}


@pytest.fixture(scope="module")
def run(tmp_path_factory, blobs):
    """(run directory, result) of a small classifier."""
    folder = tmp_path_factory.mktemp("plots") / "run"
    return folder, jmlp.train(SMALL, blobs, run_dir=folder)


def texts(figure):
    """Everything that can be read in a picture."""
    import matplotlib.text

    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def named(axes):
    return bool(axes.get_xlabel() and axes.get_ylabel())


@pytest.mark.slow
def test_curves_are_those_of_the_log(run):
    folder, _ = run
    figure = plots.run_curves(folder)
    events = [e for e in read_events(folder) if e["split"] == "train"]
    loss, accuracy = figure.axes
    assert named(loss) and named(accuracy)
    line = next(line for line in loss.lines if line.get_label() == "train")
    assert line.get_xydata().tolist() == [[e["step"], e["loss"]] for e in events]
    assert {line.get_label() for line in accuracy.lines} == {"val"}


@pytest.mark.slow
def test_runs_beside_each_other(run):
    folder, _ = run
    figure = plots.compare({"a": folder, "b": read_events(folder)}, by=("step", "seconds"))
    assert [one.get_xlabel() for one in figure.axes] == ["step", "seconds of training"]
    assert figure.axes[0].get_ylabel() == "val loss"
    assert [line.get_label() for line in figure.axes[0].lines] == ["a", "b"]
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 2


@pytest.mark.slow
def test_a_server_s_runs_by_time_and_by_updates(tmp_path, blobs):
    told = {"server": {"engine": "replay", "policy": "asp"}, "data": {"test_fraction": 0.2}}
    server = jmlp.train(merged(ASYNC, told), blobs, run_dir=tmp_path / "run").summary["server"]
    figure = plots.compare({"asp": tmp_path / "run"}, by=("virtual_seconds", "updates"))
    time, updates = (panel.lines[0].get_xdata() for panel in figure.axes)
    assert time[-1] == server["virtual_seconds"]
    assert updates[-1] == server["updates"]
    assert (np.diff(updates) > 0).all()
    curves = plots.run_curves(tmp_path / "run", server)
    assert len(curves.axes) == 4
    assert curves.get_size_inches()[0] <= 9
    bars = plots.staleness({"asp": server}).axes[0].patches
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in bars}
    assert heights == {int(k): count for k, count in server["staleness"].items()}


def test_no_two_lines_look_alike():
    assert len({tuple(style.look(i).values()) for i in range(21)}) == 21


def test_a_confusion_matrix_counts():
    figure = plots.confusion([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0], ["a", "b", "c"])
    assert "66.7% of 6 rows correct" in texts(figure)
    shares = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shares, [[1 / 2, 1 / 2, 0], [0, 1, 0], [1 / 3, 0, 2 / 3]])
    assert named(figure.axes[0])
    prices = plots.confusion([0, 1], [0, 1], ["$1 to $5", "a_b"]).axes[0]  # no formula
    assert [x.get_text() for x in prices.get_xticklabels()] == [r"\$1 to \$5", "a_b"]
    many = plots.confusion(np.arange(40), np.arange(40), [f"class {i}" for i in range(40)])
    assert len(texts(many)) < 60  # too many numbers to read are left out


@pytest.mark.slow
def test_evaluations_are_of_the_model(run, blobs, curve):
    _, result = run
    setup = result.setup
    figure = plots.evaluation(setup.programs, result.state, setup.dataset.test)
    accuracy = result.summary["test"]["accuracy"]
    assert f"{accuracy:.1%} of {setup.dataset.test.rows} rows correct" in texts(figure)
    numbers = jmlp.train(SMALL, curve)
    figure = plots.evaluation(numbers.setup.programs, numbers.state, numbers.setup.dataset.test)
    rmse = [float(title.split()[1]) for title in texts(figure) if title.startswith("rmse")]
    assert len(rmse) == 2
    assert np.mean(rmse) == pytest.approx(numbers.summary["test"]["rmse"], rel=1e-2)


def test_layouts_name_the_devices_that_hold_each_part(blobs):
    told = {"data": {"mesh": {"data": 8}}, "mixed": {"mesh": {"data": 2, "fsdp": 2, "model": 2}}}
    setups = {label: jmlp.prepare(SMALL | mesh, blobs) for label, mesh in told.items()}
    programs = {label: setup.programs for label, setup in setups.items()}
    figure = plots.layouts(programs)
    panels = np.array(figure.axes).reshape(2, -1)
    assert [t.get_text() for t in panels[0, 1].texts] == ["0 1 2 3 4 5 6 7"]
    parts = [t.get_text() for t in panels[1, 2].texts]
    kernel = programs["mixed"].shardings.params["blocks"][1]["linear"]["kernel"]
    for part in parts:
        devices = [kernel.mesh.devices.flat[int(number)] for number in part.split()]
        cuts = {str(kernel.devices_indices_map((16, 8))[device]) for device in devices}
        assert len(cuts) == 1
    assert sorted(" ".join(parts).split()) == sorted("01234567")
    found = {label: memory.of_setup(setup) for label, setup in setups.items()}
    assert found["data"].parameters == 4 * (7 * 16 + 16 + 16 * 8 + 8 + 8 * 3 + 3)
    assert found["mixed"].parameters < 0.5 * found["data"].parameters
    assert found["mixed"].optimizer < 0.5 * found["data"].optimizer
    assert min(found["data"].rows, found["data"].temporaries) > 0
    bars = plots.memory(found)
    assert bars.axes[0].get_xlabel() == "MB on each device"
    drawn = sum(bar.get_width() for bar in bars.axes[0].patches)
    assert drawn == pytest.approx(sum(map(sum, found.values())) / 1e6)


def test_large_meshes_fit_into_a_part():
    from jmlp.plots.layouts import _named

    assert _named([0, 2, 4], 9) == "0 2 4"
    assert _named(list(range(16)), 9) == "0-15"
    assert _named(list(range(0, 64, 2)), 9) == "32 devices"


@pytest.mark.slow
def test_messages_are_drawn_round_by_round():
    seen = rounds_of(ALL_REDUCE["tree"].all_reduce, 4, 8)
    figure = plots.messages(seen, "tree")
    said = texts(figure)
    assert "tree: 4 rounds, 6 messages, 48 bytes sent by each of 4 devices in the mean" in said
    assert "round 1\n2 x 32 bytes" in said
    ring = plots.messages(rounds_of(ALL_REDUCE["ring"].all_reduce, 12, 12), "ring")
    assert any("the first 16 of 22 rounds" in text for text in texts(ring))


def test_costs_name_the_fastest():
    figure = plots.costs({"slow": cost.DATA_CENTRE})
    said = texts(figure)
    small = next(iter(cost.estimates(64, 4, 8, cost.DATA_CENTRE)))
    large = next(iter(cost.estimates(250_000_000, 4, 8, cost.DATA_CENTRE)))
    assert said.count(small) >= 2 and said.count(large) >= 2  # beside the legend's
    assert named(figure.axes[0])


def test_a_schedule_draws_all_work_and_the_bubble():
    one = Schedule(4, 8, 2)
    table = one.table()
    assert table.shape == (4, one.ticks)
    assert (table >= 0).mean() == pytest.approx(1 - one.bubble)
    for device in range(4):  # each piece of work once on each device, in order
        assert [w for w in table[device] if w >= 0] == list(range(16))
    figure = plots.schedule([one])
    assert texts(figure).count("7") >= 4 * 2
    assert any("bubble 16%" in text for text in texts(figure))
    few = plots.schedule([Schedule(4, 2, 2)])  # slots without a microbatch are bubble too
    filled = [bar for bar in few.axes[0].patches if bar.get_facecolor()[:3] != (1, 1, 1)]
    assert len(filled) == 4 * 2 * 2
    assert named(plots.bubble([2, 4]).axes[0])


@pytest.mark.parametrize("file", sorted(DOCS.glob("*.json")), ids=lambda f: f.stem)
def test_what_was_measured_is_drawn(file):
    result = json.loads(file.read_text())
    if result.get("what") not in DRAWN:
        assert file.stem.startswith(
            ("aot_", "plan_", "faults", "network_choices")
        )  # tables on their pages
        return
    figure = plots.bench(result)
    assert len(figure._repr_png_()) > 5000
    assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)


def test_a_figure_is_saved_whole_or_not_at_all(tmp_path):
    figure = plots.bubble([2])
    for suffix in style.FORMATS:
        plots.save(figure, tmp_path / f"x{suffix}")
        assert (tmp_path / f"x{suffix}").stat().st_size > 1000
    for wrong, said in ((tmp_path / "x.gif", ".png, .pdf"), (tmp_path / "no" / "x.png", "no")):
        with pytest.raises(ConfigError, match=said):
            plots.check(wrong)
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        plots.save(figure, tmp_path / "taken.png")
    assert len(list(tmp_path.iterdir())) == 4


def test_the_command_line_draws(run, tmp_path, capsys):
    folder, _ = run
    there = tmp_path / "there.npz"
    x = np.random.default_rng(0).normal(size=(20, 7))
    np.savez(there, x=x, y=np.arange(20) % 3)
    config = tmp_path / "pipe.yaml"
    config.write_text(
        "data: {name: digits}\nmodel: {hidden: [16, 8]}\nstep: pipeline\nmesh: {pipe: 2, data: 4}\n"
    )
    lines = [
        ["eval", str(folder), "--data", str(there)],
        ["train", str(config), "--print-layout"],
        ["train", str(config), "--print-layout", "--step=sharded", "--mesh.pipe=1"],
        ["comm", "--topology", "ring", "--n", "4", "--size", "64", "--reducer", "none"],
        ["comm", "--topology", "tree", "--n", "4", "--rounds"],
    ]
    for number, line in enumerate(lines):
        file = tmp_path / f"{number}.png"
        assert main([*line, "--plot", str(file)]) == 0
        assert f"drawn: {file}" in capsys.readouterr().out
        assert file.stat().st_size > 5000
        assert main([*line, "--plot", str(tmp_path / "x.gif")]) == 2  # before any work
        assert "expected a name ending in" in capsys.readouterr().err
    assert main(["bench", "comm", "--plot", str(tmp_path / "x.gif")]) == 2
    assert "expected a name ending in" in capsys.readouterr().err
    assert main(["train", str(config), "--plot", "x.png"]) == 2
    assert "--print-layout" in capsys.readouterr().err
    assert main(["comm", "--rounds"]) == 2
    assert "one --topology of full, gather" in capsys.readouterr().err


def test_without_matplotlib_a_run_ends_without_its_picture(tmp_path, blobs, monkeypatch):
    for name in [n for n in sys.modules if n.startswith(("matplotlib", "jmlp.plots"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = []
    report = Reporter()
    monkeypatch.setattr(report, "note", said.append)
    summary = jmlp.train(SMALL, blobs, run_dir=tmp_path / "run", report=report).summary
    assert not summary["interrupted"]
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "curves.png").exists()
    assert said[-1] == "curves.png left out: pictures need matplotlib: pip install 'jmlp[plots]'"
    with pytest.raises(ConfigError, match="pip install 'jmlp"):
        importlib.import_module("jmlp.plots")
