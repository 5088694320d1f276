#!/usr/bin/env python
"""Writes notebooks/*.ipynb, executed from top to bottom, from the text beside them.

    scripts/notebooks.py                    all of them
    scripts/notebooks.py 03_topologies      only these

The text (`# %%` for a cell) is what is edited and reviewed; the `.ipynb` holds the same cells
with their outputs and pictures. Each runs in a kernel and an empty folder of its own. What
goes to stderr is refused: a reader should not be shown warnings.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parent.parent / "notebooks"
LIMIT_S = 120  # of a notebook, on two cores


def read(text: Path) -> nbformat.NotebookNode:
    """The notebook of a text form, without outputs; the same text gives the same notebook."""
    notebook = jupytext.read(text)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {}
    notebook["metadata"] = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook["nbformat"], notebook["nbformat_minor"] = 4, 5
    return notebook


def execute(notebook: nbformat.NotebookNode) -> float:
    """Runs all cells in place; returns the seconds that it took.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
      RuntimeError: a cell wrote to stderr.
      TimeoutError: it took longer than `LIMIT_S`.
    """
    begun_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="jmlp-notebook-") as folder:
        client = nbclient.NotebookClient(
            notebook, timeout=LIMIT_S, kernel_name="python3", record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )  # fmt: skip
        client.execute()
    took_s = time.perf_counter() - begun_s
    notebook["metadata"]["language_info"] = {"name": "python"}  # as before, whatever ran it
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise RuntimeError(f"stderr of\n{cell['source']}\n\n{output['text']}")
    if took_s > LIMIT_S:
        raise TimeoutError(f"{took_s:.0f} s; a notebook may take {LIMIT_S}")
    return took_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="e.g. 03_topologies; none: all")
    told = parser.parse_args()
    known = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
    if unknown := set(told.names) - set(known):
        sys.exit(f"no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for name in told.names or known:
        notebook = read(known[name])
        took_s = execute(notebook)
        nbformat.write(notebook, known[name].with_suffix(".ipynb"))
        print(f"{name}: {took_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
