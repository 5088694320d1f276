"""A member of a population against its own run of `jmlp.train` on one device."""

import re

import jax
import numpy as np
import pytest
from helpers import merged, some

import jmlp
from jmlp.config import parse_config
from jmlp.data.batches import Span
from jmlp.population.pack import Pack
from jmlp.population.trainer import Trainer, Want, leaves_of, member_weights

BASE = {
    "data": {"val_fraction": 0.2, "test_fraction": 0.2},
    "model": {"hidden": [6]},
    "optim": {"name": "momentum", "learning_rate": 0.05},
    "train": {"batch_size": 20, "epochs": 3},
    "mesh": {"data": 1},
    "step": "single",
}
MIXED = [{"model": {"hidden": h}} for h in ([5, 3], [8, 8], [2, 9], [16, 1])]
NUMBERS = [
    {"seed": 1, "optim": {"learning_rate": 0.1, "momentum": 0.5}, "model": {"hidden": [7]}},
    {"seed": 2, "optim": {"l2": 0.1}, "model": {"hidden": [3], "dropout": 0.3}},
    {"seed": 1, "train": {"label_smoothing": 0.2}, "model": {"hidden": [4], "dropout": 0.1}},
]
INPUTS = [
    {"model": {"hidden": [6 + i], "input_dropout": rate, "dropout": 0.2 * (i > 1)}}
    for i, rate in enumerate((0.1, 0.3, 0.25, 0.4))
]


def variants(*trees):
    return [merged(tree, *trees) for tree in MIXED]


CASES = {
    "relu": variants(),
    "numbers": NUMBERS,
    "input dropout": INPUTS,
    "input dropout, linear": [{"model": {"hidden": [], "input_dropout": r}} for r in (0.2, 0.5)],
    "linear": [{"model": {"hidden": []}, "optim": {"learning_rate": r}} for r in (0.01, 0.1)],
    "sigmoid, layer norm, dropout": [
        {"model": {"activation": "sigmoid", "norm": "layer", "dropout": 0.25, "hidden": hidden}}
        for hidden in ([5, 9], [16, 8], [12, 5])  # of two features a norm is a sign
    ],
    "gated, batch norm": variants({"model": {"activation": "swiglu", "norm": "batch"}}),
    "rms, residual": variants({"model": {"norm": "rms", "residual": True, "activation": "gelu"}}),
    "residual of equal widths": [
        {"model": {"hidden": [w, w, w], "residual": True, "init": "glorot_uniform"}}
        for w in (3, 5, 8)
    ],
    "adamw": variants({"optim": {"name": "adamw", "weight_decay": 0.1, "learning_rate": 0.01}}),
    "lamb, orthogonal": variants(
        {"optim": {"name": "lamb", "learning_rate": 0.01}, "model": {"init": "orthogonal"}}
    ),
    "lion, clipped, averaged": variants(
        {"optim": {"name": "lion", "learning_rate": 0.003, "clip_norm": 0.1, "ema": 0.9}}
    ),
    "muon": variants({"optim": {"name": "muon", "learning_rate": 0.01}}),
    "accumulated, ragged": variants({"optim": {"accumulate": 3}, "train": {"batch_size": 17}}),
    "one batch": variants({"train": {"batch_size": 500}}),
    "best": variants({"train": {"select": "best", "eval_every": "2 steps"}}),
    "four layers": [{"model": {"hidden": [w, 3, w, 4]}} for w in (2, 5)],
    "bfloat16": variants({"model": {"dtype": "bfloat16"}}),
}


def rows(classes=True, weighted=False):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 5)).astype(np.float32)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).astype(int) + (x[:, 2] > 1) if classes else x @ x[:5].T[:, :2]
    weight = {"weight": rng.uniform(0.5, 2, 150)} if weighted else {}
    return {"x": x, "y": y, **weight}


def check(trees, data, atol=3e-6, base=BASE):
    configs = [parse_config(merged(base, tree)) for tree in trees]
    trainer = Trainer(data)
    wants = [Want(i, c, trainer.total_steps(c)) for i, c in enumerate(configs)]
    seen = set()
    for pack in trainer.plan(wants):
        done = trainer.train(pack)
        # Who has ended is not trained on, though its neighbours are.
        assert list(done.ended.last.step) == [course.step for course in done.ended.courses]
        last, chosen = leaves_of(done.ended.last), leaves_of(done.ended.selected)
        arrays = {f"last/{k}": v for k, v in last.items()}
        arrays |= {f"selected/{k}": v for k, v in chosen.items()}
        for place, want in enumerate(done.wants):
            seen.add(want.member)
            solo = jmlp.train(configs[want.member], data)
            setup = trainer.setup(pack.group.config)
            _, mine = member_weights(arrays, place, want.config, setup)
            theirs = leaves_of(solo.state)
            assert [p for p in mine if p.startswith("params")] == [
                p for p in theirs if p.startswith("params")
            ]
            for path, leaf in theirs.items():
                if path.startswith(("params", "model_state")):
                    assert mine[path].shape == leaf.shape, path
                    np.testing.assert_allclose(mine[path], leaf, rtol=2e-4, atol=atol, err_msg=path)
            padded = sum(float(np.abs(v[place]).sum()) for k, v in last.items() if "params" in k)
            own = sum(float(np.abs(v).sum()) for k, v in member_weights(
                arrays, place, want.config, setup)[0].items() if "params" in k)  # fmt: skip
            assert padded == pytest.approx(own, rel=1e-6), "padding is not zero"
            for split in ("val", "test"):
                found = getattr(done, split)[place]
                assert found == pytest.approx(solo.summary[split], rel=1e-3, abs=1e-5)
    assert seen == set(range(len(configs)))


@pytest.mark.parametrize("name", some(CASES, "relu"))
def test_a_member_is_its_own_run(name):
    # Norms of two or three features amplify what rounding leaves.
    loose = {"bfloat16": 2e-2, "sigmoid, layer norm, dropout": 3e-4, "gated, batch norm": 3e-4}
    check(CASES[name], rows(), atol=loose.get(name, 1e-5))


@pytest.mark.parametrize("numbers", ["none", "piecewise_linear"])
def test_members_of_one_program_have_its_projections(numbers):
    data = rows()
    levels = np.array(list("uvw"))[np.arange(150) % 3]
    table = {f"x{i}": data["x"][:, i] for i in range(3)} | {"level": levels}
    embedding = {"name": numbers} | ({"bins": 2, "size": 2} if numbers != "none" else {})
    width = 3 + (3 if numbers == "none" else 6)  # that four columns become
    trainer = Trainer({"x": table, "y": data["y"]})
    model = {"residual": True, "number_embedding": embedding}
    trees = [{"model": {**model, "hidden": [w, w]}} for w in range(width - 2, width + 3)]
    configs = [parse_config(merged(BASE, tree)) for tree in trees]
    skips = []
    for pack in trainer.plan([Want(i, c, 9) for i, c in enumerate(configs)]):
        group = jax.tree.structure(trainer.setup(pack.group.config).programs.abstract.params)
        for want in pack.wants:  # or else it is trained as another model than its own
            own = trainer.setup(want.config).programs.abstract.params
            assert jax.tree.structure(own) == group
            skips.append("skip" in own["blocks"][0])
    assert sorted(skips) == [False, True, True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", ["squared_error", "huber", "gaussian", "quantile", "absolute_error"]
)
def test_losses_of_quantities(loss):
    check(variants({"train": {"loss": loss}}), rows(classes=False))


@pytest.mark.slow
@pytest.mark.parametrize("tree", [{}, {"train": {"class_weight": "balanced"}}, {"train": {
    "loss": "focal"}}], ids=["rows", "classes", "focal"])  # fmt: skip
def test_weights(tree):
    check(variants(tree), rows(weighted=True))


@pytest.mark.slow
@pytest.mark.parametrize("ties", ["first", "last"])
def test_early_stopping_ends_with_the_best_of_each(ties):
    train = {"early_stopping": 2, "epochs": 12, "monitor": "accuracy", "ties": ties}
    trees = [
        {"optim": {"learning_rate": rate}, "model": {"hidden": [width]}, "train": train}
        for rate, width in ((1.0, 5), (1e-6, 3), (0.05, 8))
    ]
    check(trees, rows())


def test_there_is_no_collective_in_the_program(monkeypatch):
    configs = [parse_config(merged(BASE, tree)) for tree in variants()]
    trainer = Trainer(rows())
    wants = [Want(i, c, trainer.total_steps(c)) for i, c in enumerate(configs)]
    (pack,) = trainer.plan(wants)
    calls = []
    with monkeypatch.context() as patched:
        call = Pack._call
        patched.setattr(Pack, "_call", lambda self, span: calls.append(self) or call(self, span))
        trainer.train(pack)
    running, program = calls[0], calls[0].program
    assert program.mesh.size == jax.device_count() == 8
    running.train(0)  # to its places
    rows_ = running._feed.batches(program, Span(0, 0, 1))
    call = (running.state, running.numbers, running.count, rows_, np.int32(0), np.int32(1))
    text = program.run.__wrapped__.lower(*call).compile().as_text()
    assert "while" in text
    assert not re.search(
        r"all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter", text
    )


def test_a_member_that_diverges_does_no_harm_to_its_neighbours():
    calm = [{"optim": {"learning_rate": 0.05}, "model": {"hidden": [h]}} for h in (3, 5, 7)]
    wild = {"optim": {"learning_rate": 1e30}, "model": {"hidden": [4]}}

    def trained(trees):
        trainer = Trainer(rows())
        configs = [parse_config(merged(BASE, tree)) for tree in trees]
        wants = [Want(i, c, trainer.total_steps(c)) for i, c in enumerate(configs)]
        (pack,) = trainer.plan(wants)
        done = trainer.train(pack)
        at = {want.member: place for place, want in enumerate(done.wants)}
        return done.ended, at

    alone, at = trained([*calm, merged(wild, {"optim": {"learning_rate": 0.01}})])
    beside, _ = trained([*calm, wild])
    assert [c.status for c in beside.courses] == ["ok", "ok", "ok", "diverged"]
    for ours, theirs in zip(jax.tree.leaves(alone.last), jax.tree.leaves(beside.last), strict=True):
        if np.ndim(ours):
            for member in range(3):
                assert np.array_equal(ours[at[member]], theirs[at[member]])


def test_rates_of_dropout_share_a_program():
    """Of what may be off one program has all that is on, and another all that is not."""
    configs = [parse_config(merged(BASE, tree)) for tree in INPUTS]
    trainer = Trainer(rows())
    packs = [*trainer.plan([Want(i, c, trainer.total_steps(c)) for i, c in enumerate(configs)])]
    assert sorted(len(pack.wants) for pack in packs) == [2, 2]
