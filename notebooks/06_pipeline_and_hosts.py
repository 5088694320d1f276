# %% [markdown]
# # 6. Pipelines, and several processes
#
# A pipeline gives each device some of the layers, and sends a batch through as microbatches. While
# the first ones fill the pipe and the last ones drain it, devices wait: the bubble.

# %%
import jmlp

jmlp.simulate_devices(8)

from jmlp import plots
from jmlp.parallel.pipeline_stages import Schedule

plots.schedule([Schedule(4, 4, 1), Schedule(4, 8, 1), Schedule(4, 8, 2)])

# %% [markdown]
# With S devices, M microbatches and V rounds a pass takes MV + S - 1 ticks, S - 1 of which are
# bubble for each device. More microbatches make it smaller, until their products are too small to
# be fast. Several rounds (`schedule: circular`) make it smaller at the price of more messages, if
# there are at least as many microbatches as devices.

# %%
plots.bubble([2, 4, 8])

# %% [markdown]
# ## A pipeline in the config
#
# Two pipelines of four devices, side by side. Layers may differ in width: stages are the cut whose
# costliest stage is cheapest.

# %%
from jmlp.analysis.layout_table import pipeline_rows

base = {
    "data": {"name": "digits"},
    "model": {"hidden": [256, 256, 192, 128, 128, 96]},
    "optim": {"name": "momentum", "learning_rate": 0.05},
    "train": {"epochs": 4, "batch_size": 256},
}
piped = {"step": "pipeline", "mesh": {"data": 2, "pipe": 4}, "pipeline": {"microbatches": 8}}
found = pipeline_rows(jmlp.prepare(base | piped).programs)
for stage in found["stages"]:
    print(f"stage {stage['stage']} {stage['cost']:6.1%} of the work: {', '.join(stage['layers'])}")
print(f"bubble {found['bubble']:.1%}; a message between stages: {found['message_bytes']:,} bytes")

# %% [markdown]
# The result is that of one device. What a device holds: with `remat` (the default) a tick keeps its
# input alone and computes the rest again for the backward pass.

# %%
from jmlp.analysis import memory

ways = {
    "one device": {"step": "single"},
    "pipeline": piped,
    "pipeline, no remat": piped | {"pipeline": {"microbatches": 8, "remat": False}},
}
held = {}
for name, keys in ways.items():
    held[name] = memory.of_setup(jmlp.prepare(base | keys))
    summary = jmlp.train(base | keys, verbose=False).summary
    print(f"{name:20} train loss {summary['train']['loss']:.6f}")
plots.memory(held)

# %% [markdown]
# ## Several processes
#
# A job on several hosts is several processes that run the same command. `jmlp train` finds the
# others (Slurm, MPI, Kubernetes, Cloud TPU, or plain environment variables) and joins them;
# `jmlp launch` starts them on this machine, to try it or to use its GPUs. Below, the same eight
# devices in one process and in two. `reproducible: true` asks for the same bits
# wherever they are.

# %%
import json
import subprocess
import sys
from pathlib import Path

Path("runs").mkdir(exist_ok=True)
Path("runs/hosts.yaml").write_text("""
data: {name: digits}
model: {hidden: [64]}
reproducible: true
mesh: {data: 8}
optim: {learning_rate: 1e-2}
train: {epochs: 3}
""")
jmlp_command = [sys.executable, "-m", "jmlp"]  # `jmlp` in a terminal
train = ["train", "runs/hosts.yaml", "--run-dir"]

# %%
one = [*jmlp_command, *train, "runs/one", "--cpu-devices", "8"]
print(subprocess.run(one, capture_output=True, text=True, check=True).stdout)

# %%
two = [*jmlp_command, "launch", "-n", "2", "--devices-per-process", "4", "--", *train, "runs/two"]
print(subprocess.run(two, capture_output=True, text=True, check=True).stdout)

# %%
for name in ("one", "two"):
    summary = json.loads(Path(f"runs/{name}/summary.json").read_text())
    print(f"{name:5} {summary['devices']} devices, fingerprint {summary['fingerprint']}")

# %% [markdown]
# In the first run eight devices are in one process, in the second they are in two, which exchange
# gradients over the network's loopback: the same bits. Without `reproducible: true` the two
# would agree within float32 rounding.
