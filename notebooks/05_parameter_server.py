# %% [markdown]
# # 5. A parameter server
#
# Workers pull parameters, take a gradient of their rows, push it, and go on by a policy:
#
# - `bsp`: rounds. All wait for the slowest; this is synchronous training.
# - `ssp`: nobody is more than `bound` pushes ahead of the slowest (bounded staleness).
# - `asp`: nobody waits.
#
# The engine here is `replay`: a simulated cluster with a virtual clock. Gradients are real, time is
# the simulation's, and the run is the same to the bit on any machine. `threads` and `ray` are the
# same state machine under real time.

# %%
import jmlp

jmlp.simulate_devices(8)

base = {
    "data": {"name": "digits"},
    "model": {"hidden": [64]},
    "mesh": {"data": 8},
    "step": "async",
    "train": {"epochs": 12, "batch_size": 64, "eval_every": 1},
}
# A round is one update with the rows of eight pushes: its learning rate may be larger.
sgd = {"name": "sgd", "schedule": "constant", "learning_rate": 0.05}
policies = {
    "bsp": ({"policy": "bsp"}, sgd | {"learning_rate": 0.2}),
    "ssp, bound 2": ({"policy": "ssp", "bound": 2}, sgd),
    "asp": ({"policy": "asp"}, sgd),
}
speeds = {"alike": {"jitter": 0.3}, "straggler": {"jitter": 0.3, "straggler": 5.0}}

# %%
servers, folders = {}, {}
for speed, simulate in speeds.items():
    for policy, (keys, optim) in policies.items():
        server = keys | {"engine": "replay", "simulate": simulate}
        folders[policy, speed] = f"runs/server/{policy} {speed}"
        config = base | {"server": server, "optim": optim}
        summary = jmlp.train(config, run_dir=folders[policy, speed], verbose=False).summary
        servers[policy, speed] = found = summary["server"]
        print(
            f"{speed:10} {policy:13} {found['updates']:5} updates, "
            f"{found['virtual_seconds']:6.0f} on the virtual clock, "
            f"test accuracy {summary['test']['accuracy']:.3f}"
        )

# %% [markdown]
# ## Loss against time, and against updates
#
# Workers alike but for jitter: waiting less gets further in the same time. By updates the picture
# turns, since a round's update has eight gradients in it and none of them is stale.

# %%
from jmlp import plots

plots.compare(
    {policy: folders[policy, "alike"] for policy in policies},
    by=("virtual_seconds", "updates"),
    log=True,
)

# %% [markdown]
# ## A straggler
#
# One worker is five times slower. Rounds take five times as long; under `ssp` the others run ahead
# by two pushes and then wait as well. Under `asp` they do not wait, and finish their rows early;
# the straggler is left with its own.

# %%
plots.compare(
    {policy: folders[policy, "straggler"] for policy in policies},
    by=("virtual_seconds", "updates"),
    log=True,
)

# %% [markdown]
# ## Staleness
#
# How many updates the server took between a worker's pull and its push. Rounds have none; the
# bound of `ssp` shows; under `asp` the straggler's pushes are stale by dozens.

# %%
plots.staleness({policy: servers[policy, "straggler"] for policy in policies})

# %% [markdown]
# ## What helps against a straggler
#
# Not waiting hides jitter, not a steady straggler: all the work is done when the slowest is done
# with its own. Give it less (`share_work`: slices go to whoever is free), or do without it
# (`backup`: a round takes the first seven).

# %%
ways = {
    "asp": policies["asp"],
    "asp, shared work": ({"policy": "asp", "share_work": True}, sgd),
    "bsp": policies["bsp"],
    "bsp, one backup": ({"policy": "bsp", "backup": 1}, sgd | {"learning_rate": 0.2}),
}
for name, (keys, optim) in ways.items():
    server = keys | {"engine": "replay", "simulate": speeds["straggler"]}
    folders[name] = f"runs/server/{name}"
    config = base | {"server": server, "optim": optim}
    summary = jmlp.train(config, run_dir=folders[name], verbose=False).summary
    print(
        f"{name:18} all work done at {summary['server']['virtual_seconds']:6.0f}, "
        f"test accuracy {summary['test']['accuracy']:.3f}"
    )
plots.compare({name: folders[name] for name in ways}, by=("virtual_seconds",), log=True)

# %% [markdown]
# ## Where the time went
#
# Curves of a single run come with what its server saw.

# %%
plots.run_curves(folders["bsp", "straggler"], servers["bsp", "straggler"])
