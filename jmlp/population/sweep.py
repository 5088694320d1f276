"""A sweep: from a config with a `search` section to a leaderboard.

A method asks for jobs, members are trained in packs, results are recorded as packs end, and the
method is told. A sweep that was killed is begun again by the same call: what is on record is told,
and not trained again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pydantic

from jmlp.config import parse_config
from jmlp.config.fields import expanded, plain_throughout
from jmlp.config.load import read_tree
from jmlp.distributed.agreement import is_first, peers, together
from jmlp.distributed.forks import refuse_forked
from jmlp.errors import ConfigError
from jmlp.population.leaderboard import Sweep
from jmlp.population.running import Running
from jmlp.population.space import SearchConfig, check_space, with_point
from jmlp.population.store import SweepDir, SweepShare
from jmlp.population.trainer import Planned
from jmlp.programs.precision import in_32_bits
from jmlp.report import Reporter
from jmlp.training.interrupt import stop_on_signal
from jmlp.training.setup import with_full_paths
from jmlp.types import JsonObject


@in_32_bits
def sweep(
    config: Mapping[str, object] | Path | str,
    search: Mapping[str, object] | None = None,
    data: object = None,
    *,
    run_dir: Path | str | None = None,
    report: Reporter | None = None,
    verbose: bool | None = None,
) -> Sweep:
    """Trains many members at once, and ranks them; goes on with the sweep in `run_dir`.

    Args:
      config: a mapping of a config's keys or the path of a YAML file, with a `search` section.
      search: in place of that section.
      data: as of `jmlp.train`.
      run_dir: of the sweep; None: runs/NAME_sweep, NAME that of the file, or runs/sweep.
      verbose, report: as of `jmlp.train`.

    Raises:
      ConfigError, DataError, RunDirError: what was asked for cannot be done.
    """
    refuse_forked()
    tree, settings = sweep_config(config, search)
    report = (report or Reporter.heard(verbose)) if is_first() else Reporter.silent()
    path = expanded(run_dir) if run_dir is not None else default_dir(config)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal(hand_on=True))
        stack.enter_context(np.errstate(all="warn", under="ignore"))
        mine = SweepDir(path) if is_first() else SweepShare(path, jax.process_index())
        directory = together(stack.enter_context, mine)
        running = together(Running, tree, settings, data, report)
        together(directory.begin, {**tree, "search": settings.model_dump(mode="json")})
        with peers():
            swept = running.run(directory, lambda: stop.number > 0)
        if is_first():
            swept.write()
        if swept.interrupted:
            saved = f"saved in {path}: the same call goes on from there"
            stop.said = f"stopped after {swept.members} members; {saved}"
        return swept


def plan_sweep(
    config: Mapping[str, object] | Path | str,
    search: Mapping[str, object] | None = None,
    data: object = None,
) -> Sequence[Planned]:
    """The packs in which the first members of a sweep would be trained; nothing is trained."""
    tree, settings = sweep_config(config, search)
    return Running(tree, settings, data, Reporter.silent()).first_packs()


def sweep_config(
    config: Mapping[str, object] | Path | str, search: Mapping[str, object] | None = None
) -> tuple[JsonObject, SearchConfig]:
    """The config of members without their points, and the `search` section.

    Raises:
      ConfigError: every mistake of both.
    """
    # Of a mapping from Python: it is written as YAML, and compared with what is.
    tree: JsonObject = {key: plain_throughout(of) for key, of in read_tree(config).items()}  # type: ignore[misc]  # values are checked below
    own = tree.pop("search", None)
    given: object = own if search is None else plain_throughout(dict(search))
    if given is None:
        raise ConfigError(
            "no search section: say what to search over, e.g. "
            "search: {trials: 100, space: {optim.learning_rate: {log: [1e-4, 0.1]}}}"
        )
    try:
        settings = SearchConfig.model_validate(given)
    except pydantic.ValidationError as error:
        lines: list[str] = []
        for mistake in error.errors():
            key = ".".join(["search", *map(str, mistake["loc"])])
            lines.append(f"{key}: {mistake['msg'].removeprefix('Value error, ')}")
        raise ConfigError("\n".join(lines)) from None
    check_space(settings)
    base = parse_config(tree)
    alone = "members of a sweep have a device each"
    if base.step not in ("sharded", "single"):
        raise ConfigError(f"step={base.step}: {alone}: leave step out")
    if base.mesh.data not in ("auto", 1) or base.mesh.size() > 1:
        raise ConfigError(f"mesh={dict(base.mesh)}: {alone}, of all that there are: leave mesh out")
    full = with_full_paths(base).data  # a member may be exported elsewhere
    paths = {key: getattr(full, key) for key in ("path", "val_path", "test_path")}
    tree = with_point(tree, {f"data.{key}": path for key, path in paths.items() if path})
    if base.train.init_from:
        raise ConfigError("train.init_from: members of a sweep begin afresh: leave it out")
    return tree, settings


def default_dir(config: object) -> Path:
    """Where a sweep goes that does not say: beside the runs."""
    if not isinstance(config, str | Path):
        return Path("runs") / "sweep"
    return Path("runs") / f"{Path(config).name.partition('.')[0]}_sweep"
