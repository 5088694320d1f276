# %% [markdown]
# # 3. Topologies
#
# Eight devices have a gradient each, and all want the sum. How should messages go? Nothing below
# is drawn from a formula: jmlp runs the program of each all-reduce for all devices, and looks at
# every message. Devices stand in a circle; an arrow is a message, the
# thicker the more bytes. Underneath, a line is a device and a column an element of the array, the
# darker the more of the eight addends its sum has. When all is dark, everybody has the sum.

# %%
import jmlp

jmlp.simulate_devices(8)

from jmlp import plots
from jmlp.analysis.messages import rounds_of
from jmlp.comm import ALL_REDUCE

n, size = 8, 32
seen = {
    name: rounds_of(topology.all_reduce, n, size)
    for name, topology in ALL_REDUCE.items()
    if name != "psum"  # the compiler's own, whose messages are the backend's business
}

# %% [markdown]
# **Ring.** Seven rounds of adding on the way, until each device has the whole sum of an eighth;
# seven more to hand the eighths round. Every device sends all the time, and only to its
# neighbour: the fewest bytes, the most rounds.

# %%
plots.messages(seen["ring"], "ring")

# %% [markdown]
# **Tree.** Half of the devices send all they have to their parents, then half of the rest; the
# root sends the sum back the same way. Few rounds, but whole arrays, and most devices wait.

# %%
plots.messages(seen["tree"], "tree")

# %% [markdown]
# **Full.** Everyone sends everyone its share, adds, and sends everyone the sum: two rounds for
# any n, over links between all pairs.

# %%
plots.messages(seen["full"], "full")

# %% [markdown]
# **Halving and doubling.** Partners far apart exchange halves, then quarters, then eighths: the
# bytes of a ring in the rounds of a tree.

# %%
plots.messages(seen["halving_doubling"], "halving_doubling")

# %% [markdown]
# **And the others.** `gather` sends everything to everyone; `ring2` goes both ways round;
# `double_tree` splits the array over two trees, whose leaves are the other's inner devices;
# `hierarchical` adds within hosts first; `torus` uses four links of each device at once.

# %%
for name in ("gather", "ring2", "double_tree", "hierarchical", "torus"):
    display(plots.messages(seen[name], name))

# %% [markdown]
# ## Counted against the formulas
#
# Three counts of the same: messages seen above, the formula of each topology, and the
# collectives in the HLO of the program that XLA compiled. They must agree, for any n.

# %%
from jmlp.analysis import ledger

sent = 247_766  # the parameters of 784-256-128-100-10
rows = ledger.rows(ledger.combinations(["all"], ["none"]), [n], [sent])
print(f"{'':18} {'rounds':>13} {'messages':>13} {'bytes a device':>23}")
print(f"{'topology':18} {'seen  formula':>13} {'seen  formula':>13} {'formula   compiled':>23}")
for row in rows:
    name = row["topology"]
    rounds, messages = ("", "")
    if name in seen:
        rounds, messages = seen[name].total, len(seen[name].messages)
    print(
        f"{name:18} {rounds:>4} {row['steps']:8} {messages:>4} {row['messages']:8} "
        f"{row['bytes_predicted']:12,} {row['bytes_compiled']:10,}"
    )
plots.table(rows)

# %% [markdown]
# ## Which is best when
#
# By the alpha-beta model a round takes a latency and its largest message over the bandwidth of a
# link. Where latency rules, fewest rounds win; where bandwidth does, fewest bytes over the
# busiest link. `comm.all_reduce: auto` picks by it, bucket by bucket. Links are from data sheets:
# the model ranks patterns on a network that is known, and foretells nothing about simulated
# devices, which share memory.

# %%
from jmlp.comm import cost

plots.costs({"NVLink (H100)": cost.LINKS["H100"], "between hosts": cost.DATA_CENTRE}, n=8)

# %%
plots.costs({"TPU v5p": cost.LINKS["TPU v5p"], "between hosts": cost.DATA_CENTRE}, n=64)

# %% [markdown]
# ## And the training is the same
#
# A topology is a word in the config, and no reason for another result.

# %%
config = {
    "data": {"name": "digits"},
    "model": {"hidden": [64]},
    "optim": {"name": "momentum", "learning_rate": 0.05},
    "train": {"epochs": 3},
}
single = jmlp.train(config | {"step": "single"}, verbose=False).summary
print(f"{'one device':18} loss {single['train']['loss']:.6f}")
for name in ("psum", "ring", "tree", "halving_doubling"):
    told = {"step": "explicit", "mesh": {"data": 8}, "comm": {"all_reduce": name}}
    summary = jmlp.train(config | told, verbose=False).summary
    print(f"{name:18} loss {summary['train']['loss']:.6f}")
