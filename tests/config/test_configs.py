"""Every config is read, and trains a few steps on 8 simulated devices, on rows like its own."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import some

import jmlp
from jmlp.config import load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SHOWN = [path for path in CONFIGS if path.stem in ("csv_regression", "fsdp")]
FEW = ["--train.steps=3", "--train.batch_size=64", "--train.early_stopping=null"]
WIDE = ("one_gpu", "eight_gpus", "tpu_slice", "wide_tensor", "fsdp")  # made small for 2 cores


def _rows(config):
    """Arrays, or for a table's config the file that it names."""
    rng = np.random.default_rng(0)
    if config.data.path == "fashion-mnist":
        return rng.integers(0, 256, (256, 784)).astype(np.uint8), np.arange(256) % 10
    if not config.data.path:
        return None
    names = [*(f"f{i}" for i in range(5)), *config.data.target]
    if config.data.path.endswith(".csv"):
        targets = [["ape", "bee"], rng.normal(size=(2, 2))][config.data.task != "auto"]
        rows = [[*rng.normal(size=5), *np.atleast_1d(targets[i % 2])] for i in range(200)]
        lines = [names, *rows]
        Path(config.data.path).write_text("\n".join(",".join(map(str, row)) for row in lines))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [*rng.normal(size=(5, 200)), np.arange(200) % 2]
        pq.write_table(pa.table(columns, names=names), config.data.path)
    return None


@pytest.mark.quick("fsdp")
@pytest.mark.parametrize("path", some(CONFIGS, *SHOWN), ids=lambda path: path.stem)
def test_it_trains(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = [*FEW, "--model.hidden=[128,128]"] if path.stem in WIDE else FEW
    if load_config(path).step == "async":  # whose every worker compiles a part of its own
        told = [*told, "--mesh.data=3"]
    config = load_config(path, told)
    summary = jmlp.train(config, _rows(config)).summary
    assert summary["steps"] == 3
    assert np.isfinite(summary["train"]["loss"])
    wanted = load_config(path).mesh
    for axis in ("fsdp", "model", "pipe"):
        assert summary["mesh"][axis] == getattr(wanted, axis)


def test_launch_files_name_what_there_is():
    root = CONFIGS[0].parent
    job = yaml.safe_load((root / "launch" / "jobset.yaml").read_text())
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert command[:2] == ["jmlp", "train"]
    config = load_config(root.parent / command[2], [a for a in command[3:] if "." in a[:8]])
    assert config.mesh.data == 16
    assert "srun jmlp train" in (root / "launch" / "slurm.sbatch").read_text()
    tpu = (root / "launch" / "tpu_vm.sh").read_text()
    assert "configs/tpu_slice.yaml" in tpu and (root / "tpu_slice.yaml").exists()
