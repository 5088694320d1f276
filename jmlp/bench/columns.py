"""`jmlp bench columns`: rows a second from a file of a table to batches, and in training.

    csv, parquet   the file is read, its columns fitted, and one epoch of shuffled batches made:
                   by jmlp, by pandas and scikit-learn's ColumnTransformer (one-hot up to 32
                   levels, ordinals above, medians, scale), and by grain a row at a time
    training       a mixed table against the same rows as so many plain numbers as the first
                   layer sees

All in turn (A B C A B C ...); the first turn is thrown away. grain, whose turns would take
minutes, has a tenth of the rows.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jmlp.analysis.rows import CaseRow, Result
from jmlp.bench.resume import Flags, chosen, described
from jmlp.bench.timing import Measured, compared, interleaved, say
from jmlp.data.spool import spool_folder
from jmlp.errors import ConfigError
from jmlp.report import Reporter
from jmlp.types import JsonObject

if TYPE_CHECKING:
    import pandas as pd

    from jmlp.training.setup import Setup

ROWS = 200_000
BATCH = 1024
STEPS = 400  # of a timed training
NUMBERS, SMALL, LARGE = 8, 4, 2  # columns: numbers, categories of 12 levels, of 2,000
HIDDEN = [256, 128]
_HELD_OUT: JsonObject = {"val_fraction": 0.0, "test_fraction": 0.0}


def run(flags: Flags, report: Reporter) -> Result[CaseRow]:
    """Rows a second of each way; files go to $TMPDIR."""
    try:
        import pandas  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError:
        raise ConfigError(
            "bench columns needs pandas and pyarrow: pip install pandas pyarrow"
        ) from None
    rows: list[CaseRow] = []
    with tempfile.TemporaryDirectory(prefix="jmlp-columns-", dir=spool_folder()) as folder:
        for end in ("csv", "parquet"):
            whole, part = (_file(Path(folder), end, n) for n in (ROWS, ROWS // 10))
            ways: dict[str, Measured] = {
                "jmlp": lambda path=whole: _ours(path),
                "pandas + scikit-learn": lambda path=whole: _transformer(path),
                "grain, row by row": lambda path=part: _grain(path),
            }
            rows += _measured(end, chosen(ways, flags.only, always=["jmlp"]), flags.repeats, report)
        path = _file(Path(folder), "parquet", ROWS)
        loops: dict[str, Measured] = dict(zip(("numbers", "mixed"), _trainings(path), strict=True))
        rows += _measured("training", loops, flags.repeats, report)
    return described("columns", {"table_rows": ROWS, "batch": BATCH}, rows)


def _measured(
    case: str, ways: dict[str, Measured], repeats: int, report: Reporter
) -> list[CaseRow]:
    rows = compared(case, interleaved(ways, repeats), next(iter(ways)))
    say(rows, report)
    return rows


def table(rows: int) -> "pd.DataFrame":
    """A mixed table: numbers with gaps, categories of few and of many levels, a date, a truth."""
    import pandas as pd

    rng = np.random.default_rng(0)
    columns: dict[str, object] = {}
    for i in range(NUMBERS):
        x = rng.normal(size=rows) * 10.0**i
        x[rng.random(rows) < 0.02] = np.nan
        columns[f"x{i}"] = x.round(4)
    for i, levels in enumerate([12] * SMALL + [2000] * LARGE):
        names = np.array([f"level {k}" for k in range(levels)], object)
        columns[f"c{i}"] = names[rng.integers(0, levels, rows)]
    days = np.datetime64("2020-01-01", "s") + rng.integers(0, 10**8, rows)
    columns["when"] = days
    columns["flag"] = np.array(["no", "yes"], object)[rng.integers(0, 2, rows)]
    columns["kind"] = np.array(["ape", "bee", "cat"], object)[rng.integers(0, 3, rows)]
    return pd.DataFrame(columns)


def _file(folder: Path, end: str, rows: int) -> Path:
    path = folder / f"{rows}.{end}"
    if not path.exists():
        frame = table(rows)
        frame.to_csv(path, index=False) if end == "csv" else frame.to_parquet(path, index=False)
    return path


def _ours(path: Path) -> float:
    """jmlp: from the file to an epoch's batches."""
    from jmlp.config.sections import DataConfig
    from jmlp.data.batches import epoch_index, gather
    from jmlp.data.load import load

    start_s = time.perf_counter()
    config = DataConfig.model_validate({"path": str(path), "target": "kind", **_HELD_OUT})
    split = load(config, 0).train
    index = epoch_index(0, 0, split.rows, BATCH, BATCH)
    for at in range(len(index)):
        gather(split, index[at : at + 1])
    return split.rows / (time.perf_counter() - start_s)


def _read(path: Path) -> "tuple[pd.DataFrame, np.ndarray]":
    import pandas as pd

    csv = path.suffix == ".csv"
    frame = pd.read_csv(path, parse_dates=["when"]) if csv else pd.read_parquet(path)
    frame["when"] = frame["when"].astype("int64") / 1e9
    return frame.drop(columns="kind"), frame["kind"].factorize()[0]


def _transformer(path: Path) -> float:
    """pandas and scikit-learn: the same columns, to float32 rows."""
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

    start_s = time.perf_counter()
    frame, y = _read(path)
    numbers = [*(f"x{i}" for i in range(NUMBERS)), "when"]
    few = [*(f"c{i}" for i in range(SMALL)), "flag"]
    many = [f"c{SMALL + i}" for i in range(LARGE)]
    median = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    encoded = ColumnTransformer([
        ("numbers", median, numbers),
        ("few", OneHotEncoder(sparse_output=False), few),
        ("many", OrdinalEncoder(), many),
    ])  # fmt: skip
    x = np.asarray(encoded.fit_transform(frame), np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    for at in range(0, len(x), BATCH):
        rows = order[at : at + BATCH]
        _ = x[rows], y[rows]
    return len(x) / (time.perf_counter() - start_s)


def _grain(path: Path) -> float:
    """grain: statistics by pandas, then a row at a time to a batch."""
    import grain

    start_s = time.perf_counter()
    frame, y = _read(path)
    codes = {name: {w: i for i, w in enumerate(frame[name].unique())}
             for name in frame.columns if frame[name].dtype.kind not in "fi"}  # fmt: skip
    numbers = [name for name in frame.columns if name not in codes]
    values = frame[numbers].to_numpy(np.float64)
    middle, scale = np.nanmedian(values, 0), np.nanstd(values, 0)
    records = frame.to_dict("records")

    def encoded(at: int) -> dict[str, np.ndarray]:
        row = records[at]
        x = np.array([row[name] for name in numbers])
        x = np.where(np.isnan(x), 0.0, (x - middle) / scale)
        levels = [codes[name][row[name]] for name in codes]
        return {"x": np.concatenate([x, levels]).astype(np.float32), "y": y[at]}

    rows = grain.MapDataset.range(len(records)).shuffle(seed=0).map(encoded)
    for _ in rows.to_iter_dataset().batch(BATCH):
        pass
    return len(records) / (time.perf_counter() - start_s)


def _trainings(path: Path) -> tuple[Callable[[], float], Callable[[], float]]:
    """Training steps on so many plain numbers, and on the mixed table."""
    import jax

    from jmlp.config import parse_config
    from jmlp.training.loop import Loop
    from jmlp.training.setup import prepare

    tree: JsonObject = {
        "step": "single",
        "model": {"hidden": [*HIDDEN]},
        "optim": {"name": "adam", "schedule": "constant"},
        "train": {"steps": STEPS, "batch_size": BATCH, "eval_every": f"{STEPS} steps"},
    }
    source: JsonObject = {"path": str(path), "target": "kind", **_HELD_OUT}
    mixed = prepare(parse_config({**tree, "data": source}))
    kernels = [leaf for leaf in jax.tree.leaves(mixed.programs.abstract.params)
               if leaf.ndim == 2 and leaf.shape[1] == HIDDEN[0]]  # fmt: skip
    width = max(leaf.shape[0] for leaf in kernels)
    x = np.random.default_rng(0).normal(size=(ROWS, width)).astype(np.float32)
    plain = prepare(parse_config({**tree, "data": _HELD_OUT}), (x, mixed.dataset.train.y))

    def timed(setup: "Setup") -> Callable[[], float]:
        loop = Loop(setup, Reporter.quiet())
        return lambda: loop.fit().summary["samples_per_second"]

    return timed(plain), timed(mixed)
