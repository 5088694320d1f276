"""Tables for people: the layout, the summary, the devices."""

from collections.abc import Sequence
from pathlib import Path

import jax

from jmlp.analysis.devices import Here
from jmlp.analysis.layout_table import layout_rows, pipeline_rows
from jmlp.analysis.messages import Rounds
from jmlp.analysis.rows import CommRow
from jmlp.data.columns.inspect import Inspection
from jmlp.programs.bundle import Programs
from jmlp.programs.train import ServerReport
from jmlp.report import Reporter, metrics_text
from jmlp.sharding.layout import bytes_per_device
from jmlp.types import Summary

_MESSAGES = 16  # of a round, shown by name


def print_layout(programs: Programs, report: Reporter) -> None:
    """Prints `layout_rows`, and totals with the optimizer's state."""
    from rich.table import Table

    table = Table(
        title=f"layout over {_mesh_text(dict(programs.mesh.shape))}", title_justify="left"
    )
    for column in ("parameter", "shape", "spec", "bytes/device", "not split"):
        table.add_column(column, justify="right" if "bytes" in column else "left")
    for row in layout_rows(programs):
        spec = ", ".join("+".join(e) if isinstance(e, list) else e or "-" for e in row["spec"])
        shape = "x".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, f"({spec})", f"{row['bytes_per_device']:,}", row["note"])
    report.table(table)
    state, shardings = programs.abstract, programs.shardings
    for field, said in (("params", "parameters"), ("opt_state", "optimizer state")):
        pairs = zip(
            jax.tree.leaves(getattr(state, field)),
            jax.tree.leaves(getattr(shardings, field)),
            strict=True,
        )
        sizes = [
            (leaf.size * leaf.dtype.itemsize, bytes_per_device(leaf, at.spec, programs.mesh))
            for leaf, at in pairs
        ]
        total, each = sum(size for size, _ in sizes), sum(size for _, size in sizes)
        report.note(f"{said}: {total:,} bytes in all, {each:,} on each device")


def print_pipeline(programs: Programs, report: Reporter) -> None:
    """Prints `pipeline_rows`."""
    from rich.table import Table

    pipeline = pipeline_rows(programs)
    table = Table(title="stages", title_justify="left")
    columns = ("stage", "on pipe", "layers", "cost", "bytes in use", "activations/microbatch")
    for column in columns:
        table.add_column(column, justify="left" if column == "layers" else "right")
    for row in pipeline["stages"]:
        names = row["layers"]
        said = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}" if names else "none"
        numbers = (f"{row['params_bytes']:,}", f"{row['activation_bytes']:,}")
        table.add_row(str(row["stage"]), str(row["device"]), said, f"{row['cost']:.1%}", *numbers)
    report.table(table)
    report.note(
        f"{pipeline['schedule']}: {pipeline['microbatches']} microbatches of "
        f"{pipeline['rows_per_microbatch']} rows, {pipeline['ticks']} ticks, bubble "
        f"{pipeline['bubble']:.1%}; with twice as many "
        f"{pipeline['bubble_with_twice_the_microbatches']:.1%}"
    )
    report.note(
        f"activations kept on each device: {pipeline['kept_bytes']:,} bytes; without remat "
        f"{pipeline['kept_bytes_without_remat']:,}. A message between stages: "
        f"{pipeline['message_bytes']:,} bytes"
    )
    if pipeline["costliest_by_mean"] > 1.2:
        report.note(
            f"the costliest stage costs {pipeline['costliest_by_mean']:.1f} times the mean, and "
            "the others wait for it: fewer stages, or layers more alike"
        )
    empty = sum(not row["layers"] for row in pipeline["stages"])
    if empty:
        report.warn(f"{empty} stages have no layer: lower mesh.pipe, or add layers")


def print_summary(summary: Summary, run_dir: Path, report: Reporter) -> None:
    """The last lines of a finished run."""
    splits = [name for name in ("train", "val", "test") if name in summary]
    for split in splits:
        report.note(f"{split:6} {metrics_text(summary[split])}")
    mesh = _mesh_text({k: v for k, v in summary["mesh"].items() if v > 1}) or "one device"
    took = f"{summary['seconds']:.1f} s of training"
    server = summary.get("server")
    if not server:  # whose parts are compiled meanwhile
        took += f", {summary['compile_seconds']:.1f} s of compiling"
    report.note(f"{summary['steps']} steps of step={summary['step']} over {mesh}, {took}")
    if server:
        print_server(server, report)
    files = ["summary.json", "curves.png", "checkpoints"]
    there = ", ".join(name for name in files if (run_dir / name).exists())
    report.note(f"run directory {run_dir}: {there}")


def print_inspection(inspection: Inspection, report: Reporter) -> None:
    """The table of `jmlp inspect`."""
    from rich.table import Table
    from rich.text import Text

    table = Table("column", "kind", "missing", "levels", "why", "e.g.", box=None)
    for row in inspection["columns"]:
        kind = row["kind"] if row["used"] else f"{row['kind']} (left out)"
        missing = f"{row['missing']:,}" if row["missing"] else ""
        levels = f"{row['levels']:,}" if row["levels"] else ""
        said = (row["name"], kind, missing, levels, row["why"], row["example"])
        table.add_row(*map(Text, said))  # names may look like markup
    report.note(f"{inspection['path']}: {inspection['rows']:,} rows")
    report.table(table)
    for note in inspection["notes"]:
        report.note(note)


def print_server(server: ServerReport, report: Reporter) -> None:
    """What the parameter server of a finished run saw."""
    said = [
        f"{server['engine']}, {server['policy']}, {server['workers']} workers: "
        f"{server['updates']:,} updates",
        f"staleness {server['staleness_mean']:.2f} in the mean, {server['staleness_max']} at most",
        f"a push {server['push_bytes']:,} bytes, a pull {server['pull_bytes']:,}",
    ]
    if "virtual_seconds" in server:
        said.append(f"{server['virtual_seconds']:.1f} on the virtual clock")
    if server["skipped"]:
        said.append(f"{server['skipped']:,} pushes skipped")
    report.note("; ".join(said))


def print_comm(rows: Sequence[CommRow], report: Reporter) -> None:
    """Prints the table of `jmlp comm`."""
    from rich.table import Table

    title = "bytes sent per device, mean over devices"
    table = Table(title=title, title_justify="left")
    for column in ("topology", "reducer", "n", "size", "steps", "messages", "predicted",
                   "compiled", "of none"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("topology", "reducer") else "right")
    for row in rows:
        dense = 8 * (row["n"] - 1) / row["n"] * row["size"]
        share = f"{row['bytes_compiled'] / dense:.4f}" if dense else "-"
        numbers = (row["n"], row["size"], row["steps"], row["messages"],
                   row["bytes_predicted"], row["bytes_compiled"])  # fmt: skip
        table.add_row(row["topology"], row["reducer"], *(f"{x:,}" for x in numbers), share)
    report.table(table)


def print_rounds(rounds: Rounds, report: Reporter) -> None:
    """Who sends what to whom, a line a round."""
    for number in range(1, rounds.total + 1):
        some = [message for message in rounds.messages if message.round == number]
        sizes = sorted({message.nbytes for message in some})
        size = " to ".join(f"{nbytes:,}" for nbytes in sizes if nbytes in (sizes[0], sizes[-1]))
        shown = " ".join(f"{m.source}>{m.target}" for m in some[:_MESSAGES])
        more = f" and {len(some) - _MESSAGES} more" if len(some) > _MESSAGES else ""
        report.note(f"round {number:2d}: {len(some)} x {size} bytes: {shown}{more}")
    n = rounds.addends.shape[1]
    sent = sum(message.nbytes for message in rounds.messages)
    report.note(
        f"{rounds.total} rounds, {len(rounds.messages)} messages, {sent / n:,.0f} bytes sent by "
        f"each of {n} devices in the mean"
    )


def _mesh_text(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def print_devices(here: Here, report: Reporter) -> None:
    """`inspect_devices` as lines."""
    names = here["devices"]
    some = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    report.note(f"devices    {len(names)} x {here['platform']}: {some}")
    report.note(f"processes  {here['processes']}")
    report.note(f"processor  {here['processor']}, {here['cores']} cores")
    report.note(f"threads    {here['threads'] or 'as many as cores'} (XLA:CPU pool)")
    report.note("versions   " + ", ".join(f"{k} {v}" for k, v in here["versions"].items()))
    for problem in here["problems"]:
        report.warn(problem)
    report.note("" if here["problems"] else "nothing is wrong with this set-up")
