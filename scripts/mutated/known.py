"""One-line breaks that survived the tests near to them once: its file and the line."""

from typing import NamedTuple


class Known(NamedTuple):
    """A break of a line."""

    about: str
    path: str
    line: str
    broken: str


KNOWN = [
    Known(
        "dropout with the same masks at every step",
        "jmlp/parallel/state.py",
        "key = jax.random.fold_in(jax.random.fold_in(state.key, DROPOUT), state.step)",
        "key = jax.random.fold_in(state.key, DROPOUT)",
    ),
    Known(
        "the first hidden layer shares the input's mask",
        "jmlp/model/mlp.py",
        '"layer": number + 1,',
        '"layer": number,',
    ),
    Known(
        "masks that do not know the layer",
        "jmlp/model/mlp.py",
        "jax.random.bernoulli(jax.random.fold_in(key, layer), keep, (features,))",
        "jax.random.bernoulli(key, keep, (features,))",
    ),
    Known(
        "label smoothing forgotten by a step",
        "jmlp/parallel/strategy.py",
        ".in_training(config.train.label_smoothing)",
        ".in_training(0.0)",
    ),
    Known(
        "label smoothing forgotten by a run",
        "jmlp/programs/train.py",
        "loss.in_training(config.train.label_smoothing)",
        "loss.in_training(0.0)",
    ),
    Known(
        "labels smoothed over one class less",
        "jmlp/losses/classes.py",
        "label = (1 - smoothing) * label + smoothing * z.mean(-1)",
        "label = (1 - smoothing) * label + smoothing * z[..., 1:].mean(-1)",
    ),
    Known(
        "an exchange's key that does not know the step",
        "jmlp/parallel/explicit.py",
        "key = jax.random.fold_in(jax.random.fold_in(state.key, EXCHANGE), state.step)",
        "key = jax.random.fold_in(state.key, EXCHANGE)",
    ),
    Known(
        "the same of local steps",
        "jmlp/parallel/local.py",
        "key = jax.random.fold_in(jax.random.fold_in(state.key, EXCHANGE), state.step)",
        "key = jax.random.fold_in(state.key, EXCHANGE)",
    ),
    Known(
        "one key for all buckets",
        "jmlp/compress/reducer.py",
        "axis, jax.random.fold_in(key, number))",
        "axis, key)",
    ),
    Known(
        "the same rounding noise on every device",
        "jmlp/compress/two_phase.py",
        "jax.random.split(jax.random.fold_in(key, lax.axis_index(axis)))",
        "jax.random.split(key)",
    ),
    Known(
        "the same rounding noise at every worker",
        "jmlp/parameter_server/compute.py",
        "key = jax.random.fold_in(jax.random.fold_in(key, step), place)",
        "key = jax.random.fold_in(key, step)",
    ),
    Known(
        "a residual replaced though its push was late",
        "jmlp/parameter_server/compute.py",
        'old if answer == "late" else new',
        "new",
    ),
    Known(
        "statistics begun again by each micro-batch",
        "jmlp/parallel/state.py",
        "add_part(params, model_state, part)",
        "add_part(params, state.model_state, part)",
    ),
    Known(
        "short batches counted as full",
        "jmlp/training/loop.py",
        "rows = np.minimum(batch, self.dataset.train.rows - places * batch)",
        "rows = np.full(len(places), batch)",
    ),
    Known(
        "cosine over all steps, the warm-up not taken off",
        "jmlp/optim.py",
        "schedule.rates(config, max(total_steps - warm, 1))",
        "schedule.rates(config, total_steps)",
    ),
    Known(
        "adam's eps inside the root",
        "jmlp/optim.py",
        "(jnp.sqrt(v * by_nu) + eps)",
        "jnp.sqrt(v * by_nu + eps)",
    ),
    Known(
        "muon's size by the smaller side",
        "jmlp/optim.py",
        "0.2 * max(u.shape) ** 0.5",
        "0.2 * min(u.shape) ** 0.5",
    ),
    Known("lamb's decay behind the trust ratio", "jmlp/optim.py", "after_decay=_trust_ratio)", ")"),
]
TESTS = ["tests/test_breaks.py"]
