"""What somebody may add, each with its code, its line in a table and the suite that runs on it."""

from typing import Any, NamedTuple


class Extension(NamedTuple):
    """What somebody adds, and what holds of it then."""

    code: str
    """what it is, as a file or a part of one"""
    file: str
    """the file that it is, or, if there is one, that its code goes to the end of the imports of"""
    table: str
    """the file with the table"""
    after: str
    """the line of the table that its own comes after"""
    line: str
    suite: tuple[str, ...]
    """files of tests that are made from the table"""
    config: dict[str, Any]
    broken: tuple[str, str] = ("", "")
    """a piece of the code, and what makes it wrong in its place"""


ADDED = {
    "nesterov": Extension(
        '''
        def _nesterov(config: OptimConfig) -> optax.GradientTransformation:
            return optax.trace(config.momentum, nesterov=True)
        ''',
        "jmlp/optim.py",
        "jmlp/optim.py",
        '    "muon": _muon,',
        '    "nesterov": _nesterov,',
        ("tests/parallel/test_steps.py", "tests/test_model.py"),
        {"optim": {"name": "nesterov", "momentum": 0.8}},
    ),
    "wheel": Extension(
        '''
        """All-reduce through a hub: every device sends to device 0, which sends the sum back."""

        from __future__ import annotations

        from jmlp.comm.topology import Axis, Topology, Traffic, checked, size_of
        from jmlp.deferred import lazy_imports

        with lazy_imports():
            import jax
            from jax import lax


        def wheel(x: jax.Array, axis: Axis) -> jax.Array:
            """Sums `x` over `axis`. Call inside `jax.shard_map`."""
            total, n = checked(x), size_of(axis)
            for other in range(1, n):
                total = total + lax.ppermute(x, axis, [(other, 0)])
            if n == 1:
                return total
            # Device 0 sends to itself as well: all take the sum the same way, to the same bits.
            sent = [lax.ppermute(total, axis, [(0, other)]) for other in range(n)]
            return sum(sent[1:], sent[0])


        def traffic(size: int, itemsize: int, n: int) -> Traffic:
            """What `wheel` sends."""
            hub = 2 * (n - 1) * size * itemsize
            return Traffic(2 if n > 1 else 0, 2 * (n - 1), hub / n, hub)


        WHEEL = Topology(wheel, traffic)
        ''',
        "jmlp/comm/wheel.py",
        "jmlp/comm/__init__.py",
        '    "psum": Topology(psum.all_reduce, psum.traffic, rounds=ring.rounds),',
        '    "wheel": "jmlp.comm.wheel:WHEEL",',
        ("tests/comm/test_comm.py",),
        {"step": "explicit", "comm": {"all_reduce": "wheel"}},
        ("range(1, n)", "range(2, n)"),
    ),
    "leading": Extension(
        '''
        """The first numbers of each bucket, by whatever all-reduce there is; the rest is left."""

        from __future__ import annotations

        from typing import Annotated

        from pydantic import Field

        from jmlp.comm.topology import Axis, Traffic, size_of
        from jmlp.compress.reducer import Exchange, Reducer, Scheme, of_vectors
        from jmlp.config.fields import Float
        from jmlp.config.sections import ReducerConfig
        from jmlp.deferred import lazy_imports

        with lazy_imports():
            import jax
            import jax.numpy as jnp


        class Leading(ReducerConfig):
            """The `reducer` section with `leading`."""

            share: Annotated[Float, Field(gt=0, le=1)] = 0.5
            """Share of the numbers that is sent."""


        def leading(exchange: Exchange, settings: Leading) -> Reducer:
            """The reducer."""

            def kept(size: int) -> int:
                return max(1, round(settings.share * size))

            def mean(
                vector: jax.Array, axis: Axis, key: jax.Array
            ) -> tuple[jax.Array, jax.Array]:
                sent, n = vector[: kept(vector.size)], size_of(axis)
                total = exchange.all_reduce(sent.size, 4, n)[1](sent, axis) / n
                rest = (0, vector.size - sent.size)
                return jnp.pad(total, rest), jnp.pad(sent, rest)

            def traffic(size: int, n: int) -> list[Traffic]:
                return [exchange.traffic(kept(size), 4, n)]

            return of_vectors(exchange, mean, traffic)._replace(linear=True)


        LEADING = Scheme(leading, Leading)
        ''',
        "jmlp/compress/leading.py",
        "jmlp/compress/__init__.py",
        '    "low_rank": Scheme(low_rank, LowRank),',
        '    "leading": "jmlp.compress.leading:LEADING",',
        ("tests/compress/test_compress.py", "tests/compress/test_papers.py", "tests/config"),
        {"step": "explicit", "comm": {"reducer": {"name": "leading", "share": 0.25}}},
        ("jnp.pad(sent, rest)\n", "vector\n"),
    ),
    "spaced": Extension(
        '''
        """Numbers with spaces between; in the last column classes, where there are labels."""

        from pathlib import Path

        import numpy as np

        from jmlp.data.dataset import Columns, Raw, RawSplits, reading
        from jmlp.errors import DataError


        def read(path: Path, columns: Columns) -> RawSplits:
            """The rows of a file."""
            with reading(path, "table of numbers"):
                table = np.loadtxt(path, ndmin=2)
            if table.shape[1] < 2:
                raise DataError(f"{path}: {table.shape[1]} columns; expected features and a class")
            x, y = (table[:, :-1], table[:, -1].astype(int)) if columns.labelled else (table, None)
            return RawSplits(Raw(x, y, where=lambda row: f"{path} line {row + 1}"))
        ''',
        "jmlp/data/formats/spaced.py",
        "jmlp/data/__init__.py",
        '    ".parquet": "jmlp.data.formats.parquet:read",',
        '    ".spaced": "jmlp.data.formats.spaced:read",',
        ("tests/data/test_sources.py",),
        {"data": {"path": "train.spaced"}},
        ("with reading(path", "if (path"),
    ),
    "pseudo_huber": Extension(
        '''
        """Squares of small errors, and large ones themselves."""

        from __future__ import annotations

        from jmlp.deferred import lazy_imports
        from jmlp.losses.loss import Loss

        with lazy_imports():
            import jax
            import jax.numpy as jnp


        def pseudo_huber(outputs: jax.Array, y: jax.Array) -> jax.Array:
            """(B,), the mean over K."""
            return (jnp.sqrt(1 + jnp.square(outputs - y)) - 1).mean(-1)


        PSEUDO_HUBER = Loss(name="pseudo_huber", per_row=pseudo_huber, tasks=("regression",))
        ''',
        "jmlp/losses/pseudo_huber.py",
        "jmlp/losses/__init__.py",
        '    "gaussian": GAUSSIAN,',
        '    "pseudo_huber": "jmlp.losses.pseudo_huber:PSEUDO_HUBER",',
        ("tests/parallel/test_losses.py",),
        {"data": {"name": "diabetes"}, "train": {"loss": "pseudo_huber"}},
        ("outputs - y", "outputs - y.mean(0)"),
    ),
    "second_best": Extension(
        '''
        """Share of rows whose class is among the two of the largest logits."""

        import numpy as np

        from jmlp.metrics.metric import Metric


        def second_best(y_true: np.ndarray, outputs: np.ndarray) -> float:
            """Of class indices (N,) and logits (N, K)."""
            return float((outputs.argsort(-1)[:, -2:] == y_true[:, None]).any(-1).mean())


        SECOND_BEST = Metric(
            name="second_best", of_outputs=second_best, best="higher", tasks=("classification",)
        )
        ''',
        "jmlp/metrics/second_best.py",
        "jmlp/metrics/__init__.py",
        '    "pinball": PINBALL,',
        '    "second_best": "jmlp.metrics.second_best:SECOND_BEST",',
        ("tests/metrics/test_metrics.py",),
        {"train": {"metrics": ["second_best"], "monitor": "second_best"}},
        (".mean())", "[0])"),
    ),
    "tally": Extension(
        '''
        """Counts evaluations, in the run directory."""

        from jmlp.training.callbacks import Callback, Metrics, RunView


        class Tally(Callback):
            """tally.txt: a stroke an evaluation."""

            def on_evaluation(self, view: RunView, metrics: Metrics) -> None:
                if view.run_dir:
                    with (view.run_dir / "tally.txt").open("a") as file:
                        file.write("|")
        ''',
        "jmlp/training/tally.py",
        "jmlp/training/callbacks.py",
        '    "curves": lambda: AtEnd("jmlp.plots.run:Curves", "curves.png"),',
        '    "tally": "jmlp.training.tally:Tally",',
        ("tests/training/test_callbacks.py",),
        {"train": {"callbacks": ["tally"]}},
        ('file.write("|")', 'view.stop("enough")'),
    ),
    "bottleneck": Extension(
        '''
        """A hidden layer of two products with few features between them."""

        from __future__ import annotations

        from jmlp.config.fields import Count
        from jmlp.config.sections import ModelConfig
        from jmlp.deferred import lazy_imports
        from jmlp.model import ACTIVATIONS, BlockKind

        with lazy_imports():
            import jax
            from flax import nnx


        class Narrow(ModelConfig):
            """The `model` section with `bottleneck`."""

            between: Count = 4
            """Features between the products of a block."""


        def bottleneck(
            inputs: int, width: int, config: Narrow, rngs: nnx.Rngs
        ) -> nnx.Module:
            """(B, H) of (B, F)."""

            class Bottleneck(nnx.Module):
                def __init__(self) -> None:
                    self.down = nnx.Linear(inputs, config.between, use_bias=False, rngs=rngs)
                    self.up = nnx.Linear(config.between, width, rngs=rngs)

                def __call__(self, h: jax.Array) -> jax.Array:
                    return ACTIVATIONS[config.activation].function(self.up(self.down(h)))

            return Bottleneck()


        BOTTLENECK = BlockKind(make=bottleneck, settings=Narrow)
        ''',
        "jmlp/model/bottleneck.py",
        "jmlp/model/__init__.py",
        '    "plain": BlockKind(make=_plain, cut_by_hand=True),',
        '    "bottleneck": "jmlp.model.bottleneck:BOTTLENECK",',
        ("tests/parallel/test_blocks.py", "tests/config/test_words.py"),
        {"model": {"block": "bottleneck", "between": 3}},
    ),
}  # fmt: skip
