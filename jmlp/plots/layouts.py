"""Pictures of where arrays live: which devices hold which part, and how much memory that is."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from jax.sharding import Mesh
from jax.tree_util import tree_leaves_with_path
from matplotlib.patches import Rectangle

from jmlp.analysis.memory import Memory
from jmlp.plots.style import BLUE, GREY, ORANGE, PURPLE, SKY, Figure, bytes_text, legend, new, tidy
from jmlp.programs.bundle import Programs
from jmlp.sharding import layout

if TYPE_CHECKING:
    from jax.sharding import NamedSharding, PartitionSpec
    from matplotlib.axes import Axes

# Light, so that numbers can be read on them: Okabe and Ito's, mixed with white.
TINTS = (
    "#9ecae1", "#f4c79a", "#a6d8c7", "#f2e9a0", "#dfb9d0", "#c4dff2", "#d8a790", "#cfcfcf",
)  # fmt: skip
_SHOWN = 5  # kernels beside the batch


def layouts(programs: Mapping[str, Programs]) -> Figure:
    """Batch and kernels, cut as they are at rest; in each part the devices that hold it.

    Args:
      programs: label -> programs, a line each (`jmlp.prepare(config).programs`). Of deep
        models the first kernels and the last are drawn.
    """
    drawn = {label: _arrays(one) for label, one in programs.items()}
    columns = max(map(len, drawn.values()))
    figure, panels = new(columns, len(drawn), width=min(2.2 * columns, 11), height=2.0 * len(drawn))
    for axes in panels.flat:
        axes.set_axis_off()
    for line, (label, arrays) in zip(panels, drawn.items(), strict=True):
        sizes = {axis: size for axis, size in programs[label].mesh.shape.items() if size > 1}
        mesh = "\n".join(f"{axis}={size}" for axis, size in sizes.items())
        for axes, (name, shape, sharding) in zip(line, arrays, strict=False):
            axes.set_axis_on()
            _parts(axes, shape, sharding)
            axes.set_title(f"{name}\n{shape[0]:,} x {shape[1]:,}", fontsize=8)
            axes.set_xlabel(_spec(sharding.spec, sizes), fontsize=7, labelpad=2)
        line[0].set_ylabel(f"{label}\n{mesh or 'one device'}", fontsize=9)
    return figure


def _arrays(programs: Programs) -> "list[tuple[str, tuple[int, ...], NamedSharding]]":
    """(name, shape, sharding) of a batch's rows, and of kernels."""
    leaves = tree_leaves_with_path(programs.abstract.params)
    shardings = [at for _, at in tree_leaves_with_path(programs.shardings.params)]
    kernels = [
        (layout.path_of(path).removesuffix("/kernel"), leaf.shape, at)
        for (path, leaf), at in zip(leaves, shardings, strict=True)
        if len(leaf.shape) == 2
    ]
    if len(kernels) > _SHOWN:
        kernels = [*kernels[: _SHOWN - 1], kernels[-1]]
    rows = (programs.width, programs.schema.features)
    return [("batch (rows)", rows, layout.batch_sharding(programs.mesh)), *kernels]


def _spec(spec: "PartitionSpec", split: Mapping[str, int]) -> str:
    said: list[str] = []
    for what, entry in zip(("rows", "columns"), spec, strict=False):
        axes = [axis for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis in split]
        if axes:
            said.append(f"{what} over {', '.join(axes)}")
    return "; ".join(said) or "whole on each"


def _parts(axes: "Axes", shape: tuple[int, ...], sharding: "NamedSharding") -> None:
    height, width = shape
    holders: dict[tuple[int, ...], list[int]] = {}
    cuts, mesh = sharding.devices_indices_map(shape), sharding.mesh
    assert isinstance(mesh, Mesh)
    for number, device in enumerate(mesh.devices.flat):
        cut = [part.indices(size)[:2] for part, size in zip(cuts[device], shape, strict=True)]
        holders.setdefault((*cut[0], *cut[1]), []).append(number)
    rows = len({key[:2] for key in holders})
    across = len({key[2:] for key in holders})
    for number, ((top, bottom, left, right), devices) in enumerate(sorted(holders.items())):
        corner = (left / width, top / height)
        size = ((right - left) / width, (bottom - top) / height)
        colour = TINTS[number % len(TINTS)]
        axes.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor="0.25", lw=0.8))
        room = max(1, round(9 / across))
        lines = max(1, round(6 / rows))
        text = _named(devices, room * lines)
        words = text.split(" ")
        wrapped = "\n".join(" ".join(words[i : i + room]) for i in range(0, len(words), room))
        middle = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
        axes.text(*middle, wrapped, ha="center", va="center", fontsize=7)
    axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])


def _named(devices: list[int], room: int) -> str:
    """`0 2 4 6`, or a range, or how many they are, as there is room for."""
    if len(devices) <= room:
        return " ".join(map(str, devices))
    if devices[-1] - devices[0] == len(devices) - 1:
        return f"{devices[0]}-{devices[-1]}"
    return f"{len(devices)} devices"


def memory(by_layout: Mapping[str, Memory]) -> Figure:
    """What one device holds, stacked, a bar a layout.

    Args:
      by_layout: label -> `memory.of_setup`.
    """
    colours = {
        "parameters": BLUE, "optimizer": SKY, "compressor": PURPLE, "rows": ORANGE,
        "temporaries": GREY,
    }  # fmt: skip
    figure, ((axes,),) = new(width=9, height=1.3 + 0.42 * len(by_layout))
    left = [0.0] * len(by_layout)
    for part, colour in colours.items():
        sizes = [getattr(one, part) / 1e6 for one in by_layout.values()]
        if any(sizes):
            axes.barh(range(len(by_layout)), sizes, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for place, one in enumerate(by_layout.values()):
        axes.annotate(
            bytes_text(sum(one)), (left[place], place), (4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(by_layout)), list(by_layout))
    axes.invert_yaxis()
    axes.set(xlabel="MB on each device", xlim=(0, 1.12 * max(left)))
    tidy(axes, "x")
    legend(axes, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize=8)
    return figure
