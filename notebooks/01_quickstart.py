# %% [markdown]
# # 1. Quickstart
#
# From data to a trained, evaluated, saved and loaded model that predicts: ten lines. Then
# the same one level down, where the loop is yours.
#
# Eight devices are simulated on the CPU here. On GPUs or TPUs leave that line out; nothing
# else changes.

# %%
import jmlp

jmlp.simulate_devices(8)  # first, before anything else uses jax

config = {
    "data": {"name": "digits"},
    "model": {"hidden": [256, 128], "dropout": 0.2},
    "mesh": {"data": 4, "model": 2},  # the batch over 4, each layer over 2
    "train": {"epochs": 20},
}
result = jmlp.train(config, run_dir="runs/quickstart")
result.summary["test"]

# %% [markdown]
# Everything about the run lies in its directory: the config with every default, the log, a
# summary, verified checkpoints. `jmlp.train` with the same directory continues it, bit for
# bit, wherever it was cut.

# %%
from jmlp import plots

plots.run_curves("runs/quickstart")

# %% [markdown]
# A run is opened to evaluate it or to predict with it, here or in another process, on as many
# devices as there are then. `jmlp eval runs/quickstart --plot confusion.png` draws the same.

# %%
run = jmlp.open_run("runs/quickstart")
test = result.setup.dataset.test
plots.evaluation(run.programs, run.state, test)

# %%
schema = result.setup.dataset.schema
pixels = test.x[:20] * schema.x_scale + schema.x_mean  # a data set has rows as the model takes them
predicted = jmlp.predict(run, pixels).columns["prediction"].astype(int)  # a run takes raw ones
true = test.y[:20]
titles = [f"{p}" if p == t else f"{p}, not {t}" for p, t in zip(predicted, true, strict=True)]
plots.images(pixels, titles, wrong=predicted != true)

# %% [markdown]
# ## Arrays of one's own
#
# Rows may come from a CSV, Parquet, `.npz` or IDX file (`data: {path: ...}`), or from arrays.
# Whole numbers are classes, other numbers a regression.

# %%
import numpy as np

rng = np.random.default_rng(0)
x = rng.uniform(-2, 2, size=(2000, 3))
y = np.stack([np.sin(2 * x[:, 0]) * x[:, 1], x[:, 2] ** 2], axis=1)
small = {
    "model": {"hidden": [64, 64], "activation": "gelu"},
    "optim": {"learning_rate": 1e-2},
    "train": {"epochs": 60},
}
own = jmlp.train(small, (x, y))
plots.evaluation(own.setup.programs, own.state, own.setup.dataset.test)

# %% [markdown]
# ## One level down
#
# `jmlp.prepare` stops before the loop and hands out the parts: the resolved config, the data,
# the compiled programs. One call of `programs.train.run` takes as many steps as it is told, in one
# dispatch.

# %%
from jmlp.data.batches import epoch_index
from jmlp.programs.placement import Resident

setup = jmlp.prepare(config)
programs, rows = setup.programs, setup.dataset.train
print(programs.mesh)

state = programs.init(seed=0)  # parameters are born where they live
images, labels = programs.place(rows)
for epoch in range(5):
    order = epoch_index(0, epoch, rows.rows, 128, programs.width)  # (steps, rows of a batch)
    source = Resident(images, labels, programs.place_index(order))
    state, losses = programs.train.run(state, source, np.int32(0), np.int32(len(order)))
    print(f"epoch {epoch}: loss {np.nanmean(losses):.3f}")
programs.evaluate(state, setup.dataset.test)

# %% [markdown]
# And below that is a step: a pure function of a state and a batch, whose arrays say where
# they live.

# %%
kernel = state.params["blocks"][0]["linear"]["kernel"]
print("the first kernel:", kernel.shape, "cut by", kernel.sharding.spec)
print("what one device holds of it:", kernel.addressable_shards[0].data.shape)

batch = {"x": rows.x[:128], "y": rows.y[:128], "weight": np.ones(128, np.float32)}
state, metrics = programs.train.step(state, batch)
print("loss of that batch:", float(metrics["loss"]))
