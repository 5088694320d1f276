"""From the config's `comm` section to a reducer for a mesh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from jmlp.comm import ALL_REDUCE
from jmlp.comm.buckets import Leaf, fill, size_of
from jmlp.comm.cost import DATA_CENTRE, Link, estimates, link_of
from jmlp.comm.links import read
from jmlp.comm.topology import AllReduce, Traffic, bound
from jmlp.compress import REDUCERS, Exchange, Reducer, error_feedback
from jmlp.config.sections import CommConfig
from jmlp.deferred import lazy_imports
from jmlp.errors import ConfigError
from jmlp.types import PyTree

with lazy_imports():
    import jax


class Prices(Protocol):
    """Seconds of an all-reduce of `size` elements over n devices, by topology, fastest first."""

    def __call__(
        self, size: int, itemsize: int, n: int, names: Iterable[str] | None = None
    ) -> dict[str, float]:
        """Of `names`; without, of all that `all_reduce: auto` chooses from."""
        ...


def make_reducer(comm: CommConfig, mesh: jax.sharding.Mesh) -> Reducer:
    """The reducer that `comm` asks for, over the `data` axis of `mesh`.

    Raises:
      ConfigError: `comm.inner` does not divide the axis, or a type is missing here.
    """
    settings = comm.reducer
    reducer = REDUCERS[settings.name].make(make_exchange(comm, mesh), settings)
    if settings.error_feedback:
        return error_feedback(reducer, settings.momentum)
    return reducer


def make_exchange(comm: CommConfig, mesh: jax.sharding.Mesh) -> Exchange:
    """How `comm` moves vectors over the `data` axis of `mesh`.

    Raises:
      ConfigError: `comm.inner` does not divide the axis, or `comm.links` is not of it.
    """
    inner, price = prices(comm, mesh)
    settings = comm.own() | {"inner": inner}

    def choose(size: int, itemsize: int, n: int) -> str:
        if comm.all_reduce != "auto":
            return comm.all_reduce
        return next(iter(price(size, itemsize, n)))

    def all_reduce(size: int, itemsize: int, n: int) -> tuple[str, AllReduce]:
        name = choose(size, itemsize, n)
        return name, bound(ALL_REDUCE[name], settings).all_reduce

    def traffic(size: int, itemsize: int, n: int) -> Traffic:
        name = choose(size, itemsize, n)
        return bound(ALL_REDUCE[name], settings).traffic(size, itemsize, n)

    lossy = "ring" if comm.all_reduce == "ring" else "full"
    return Exchange(all_reduce, traffic, comm.bucket, lossy)


def prices(comm: CommConfig, mesh: jax.sharding.Mesh) -> tuple[int | None, Prices]:
    """The devices of a fast group, and what `auto` goes by: measured, or the kind of device.

    Raises:
      ConfigError: `comm.inner` does not divide the axis, or `comm.links` is not of it.
    """
    devices = list(mesh.devices.flat)
    n, hosts = mesh.shape["data"], len({d.process_index for d in devices})
    settings = comm.own()
    said = inner = settings.get("inner")
    if inner is not None and n % inner:
        raise ConfigError(f"comm.inner={inner} does not divide mesh.data={n}")
    if inner is None and hosts > 1 and n % hosts == 0:
        inner = n // hosts
    if settings.get("links"):
        links = read(settings["links"], n)
        near = said or links.inner()
        return near, lambda size, itemsize, n, names=None: links.estimates(
            size, itemsize, n, names, near
        )
    link = link_for(comm, devices[0].device_kind)
    slow = DATA_CENTRE if hosts > 1 else None
    return inner, lambda size, itemsize, n, names=None: estimates(
        size, itemsize, n, link, slow, inner, names
    )


def link_for(comm: CommConfig, device_kind: str) -> Link:
    """The link of a kind of device, with what `comm` says of it."""
    link = link_of(device_kind)
    alpha_s = link.alpha_s if comm.alpha_us is None else comm.alpha_us * 1e-6
    per_s = comm.gigabytes_per_second
    return Link(alpha_s, link.bytes_per_s if per_s is None else per_s * 1e9)


def explain(comm: CommConfig, mesh: jax.sharding.Mesh, leaves: Sequence[Leaf]) -> list[str]:
    """A line for each bucket: its size, what topologies would take, and the one `auto` picked."""
    (_, price), n = prices(comm, mesh), mesh.shape["data"]
    lines: list[str] = []
    for number, bucket in enumerate(fill(leaves, comm.bucket)):
        size = size_of(leaves, bucket)
        by_topology = price(size, 4, n)
        first = next(iter(by_topology))
        others = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in list(by_topology.items())[:4])
        lines.append(
            f"bucket {number}: {len(bucket)} arrays, {size * 4 / 1e6:.2f} MB over {n} "
            f"devices ({others}) by {first}"
        )
    return lines


def shapes_of(tree: PyTree) -> list[jax.ShapeDtypeStruct]:
    """The leaves of a tree of arrays or shapes, as shapes."""
    return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
