# %% [markdown]
# # 2. Meshes and layouts
#
# The same model on the same eight devices, split in four ways. `data` copies the model and
# cuts the batch. `fsdp` cuts both, and gathers a layer's parameters while they are used. Tensor
# parallelism (`model`) cuts the layers themselves, so that each device computes some of the
# features. A mesh may have all of them.

# %%
import jmlp

jmlp.simulate_devices(8)

layouts = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 1, "model": 8},
    "mixed": {"data": 2, "fsdp": 2, "model": 2},
}
base = {
    "data": {"name": "digits"},
    "model": {"hidden": [512, 512]},
    "optim": {"name": "momentum", "learning_rate": 0.05},
    "train": {"epochs": 5},
}
setups = {name: jmlp.prepare(base | {"mesh": mesh}) for name, mesh in layouts.items()}

# %% [markdown]
# ## Who holds what
#
# Each box is an array, cut as it is at rest; the numbers are the devices that hold a part. A
# layer's kernel is cut by columns and the next one's by rows (Megatron-LM), so that two layers
# need one sum over `model`. The last layer has ten columns, which eight devices do not divide:
# it stays whole, and `jmlp train CONFIG --print-layout` says so.

# %%
from jmlp import plots

plots.layouts({name: setup.programs for name, setup in setups.items()})

# %% [markdown]
# ## What a device holds
#
# Parameters and optimizer state are counted by shard; temporaries (activations, gradients,
# buffers) are the compiler's own account of a step. The training rows are on every device here,
# since they are few.

# %%
from jmlp.analysis import memory

found = {name: memory.of_setup(setup) for name, setup in setups.items()}
plots.memory(found)

# %% [markdown]
# ## The same numbers
#
# The split must not show in the result. One device is the reference; with plain momentum a
# wrongly scaled gradient would be seen at once (Adam would hide it).

# %%
runs = {"single": {"step": "single"}} | {name: {"mesh": mesh} for name, mesh in layouts.items()}
results = {
    name: jmlp.train(base | keys, run_dir=f"runs/layouts/{name}", verbose=False)
    for name, keys in runs.items()
}
plots.compare({name: f"runs/layouts/{name}" for name in runs}, split="train", nested=True)

# %%
from jmlp.training.run_dir import read_events

losses = {
    name: [e["loss"] for e in read_events(f"runs/layouts/{name}") if e["split"] == "train"]
    for name in runs
}
print(f"{'layout':8} {'largest difference of the loss':>32} {'bytes sent a step':>18}   test")
for name, result in results.items():
    apart = max(abs(a - b) for a, b in zip(losses[name], losses["single"], strict=True))
    sent = result.summary["wire_bytes_per_step"] or 0
    print(f"{name:8} {apart:32.1e} {sent:18,}   {result.summary['test']['accuracy']:.4f}")

# %% [markdown]
# Data parallelism sends a gradient a step, whatever the batch. Tensor parallelism sends
# activations, which grow with the batch and not with the model's width squared: it pays for wide
# layers and a fast network. `fsdp` gathers parameters as well, and is for models that do not fit.
# On XLA:CPU, which has no reduce-scatter, gradients are all-reduced and then cut.
