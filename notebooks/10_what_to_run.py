# %% [markdown]
# # 10. What to run, before it is run
#
# Three questions about devices that are not here. Nothing is compiled and no array is made: shapes,
# a trace of one device's step and figures of the devices are enough. See the guide "What to run".

# %%
from importlib import resources
from pathlib import Path

import jmlp
from jmlp import plots

kinds = resources.files("jmlp.planner") / "kinds"

# %% [markdown]
# ## Two billion parameters on 8 GPUs of 16 GB
#
# The kind is a file; this one is an A100's with less memory. Two layers of 32768 features between
# 32768 inputs and 10 classes are 2.1 billion parameters; with Adam 26 GB of state.

# %%
text = (kinds / "a100.yaml").read_text()
Path("small.yaml").write_text(
    text.replace("memory_bytes: {value: 80e9", "memory_bytes: {value: 16e9")
)
large = {"model": {"hidden": [32768, 32768]}, "train": {"batch_size": 4096}}
plans = jmlp.plan(large, "small.yaml:8", sizes=(32768, 10, 100_000))
best = plans.best
print("fits:", sum(plan.fits for plan in plans.plans), "of", len(plans.plans), "ways")
print(best.config.step, dict(best.config.mesh), f"{best.memory.total / 1e9:.0f} GB a device")

# %% [markdown]
# One device is far from enough, and so is data parallelism, where each holds all. What fits splits
# the parameters.

# %%
plots.plan_memory([*plans.plans[:5], plans.one_device])

# %%
plots.plan_time(plans.plans[:6])

# %%
plots.roofline(plans, plans.plans[:3])

# %% [markdown]
# ## A 64-64 classifier on 256 chips
#
# Hundreds of chips for a model of 9,000 parameters and batches of 256 rows: messages cost more than
# the work they share out. One device is the answer there, and the number says by how much.

# %%
tiny = {"model": {"hidden": [64, 64]}, "train": {"batch_size": 256}}
plans = jmlp.plan(tiny, "v5e:16x16", sizes=(64, 10, 100_000))
all_chips = next(plan for plan in plans.plans if plan.devices == 256)
print(f"best: {plans.best.devices} device, {1e6 * plans.best.seconds.expected:.0f} us a step")
print(f"256 devices: {1e6 * all_chips.seconds.expected:.0f} us a step")

# %%
plots.plan_time([plans.one_device, *plans.plans[1:4], all_chips])

# %% [markdown]
# The answer is one of this batch. With more rows a step there is more to share, and from some batch
# on the model prefers many chips: by formula, from figures of a data sheet and latencies that are
# assumed, so that where it turns is not known well. Measure before you take 256 chips for it.

# %%
for rows in (256, 1024, 4096, 16384):
    more = {"model": {"hidden": [64, 64]}, "train": {"batch_size": rows}}
    plans = jmlp.plan(more, "v5e:16x16", sizes=(64, 10, 100_000))
    best, one = plans.best, plans.one_device
    times = [f"{1e6 * t:.0f}" for t in (one.seconds.expected, best.seconds.low,
                                        best.seconds.expected, best.seconds.high)]  # fmt: skip
    print(f"{rows:5} rows: one chip {times[0]} us a step; best {best.devices} chips, "
          f"{times[2]} us ({times[1]} to {times[3]})")  # fmt: skip

# %% [markdown]
# ## Fifty layers on 4 hosts with a slow link
#
# Hosts of one A100 each, with 1 Gbit/s between them: what goes over the link decides.

# %%
between = text[text.index("between:") :]
rate = between.split("bytes_per_s: {value: ")[1].split(",")[0]
slow = text.replace(between, between.replace(f"value: {rate}", "value: 1.25e8"))
Path("slow.yaml").write_text(slow)
deep = {"model": {"hidden": [2048] * 49}, "train": {"batch_size": 8192}}
plans = jmlp.plan(deep, "slow.yaml:1x4", sizes=(784, 10, 100_000))
for plan in plans.plans[:3]:
    print(plan.config.step, dict(plan.config.mesh), plan.seconds.bound)

# %%
spread = [plan for plan in plans.plans if plan.devices == 4]
plots.plan_time([plans.one_device, *spread[:5]])

# %% [markdown]
# Ask for what trains something else as well: compressed sums, or local steps.

# %%
more = jmlp.plan(deep, "slow.yaml:1x4", sizes=(784, 10, 100_000), also=("reducers", "local"))
plots.plan_time([plan for plan in more.plans if plan.devices == 4][:6])
