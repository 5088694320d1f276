# %% [markdown]
# # 4. Compression
#
# What becomes of a gradient on the wire is a word in the config, `comm.reducer`: fewer bits
# (bf16, fp8, int8, int4, sign), fewer numbers (top_k, random_k), or fewer dimensions
# (low_rank, which is PowerSGD). What is lost may be owed: with error feedback each device adds it
# to its next gradient.

# %%
import jmlp

jmlp.simulate_devices(8)

base = {
    "data": {"name": "digits"},
    "model": {"hidden": [128]},
    "mesh": {"data": 8},
    "step": "explicit",
    "optim": {"name": "momentum", "learning_rate": 0.05},
    "train": {"epochs": 4, "batch_size": 64, "eval_every": 100},
}
reducers = [
    {"name": "none"},
    {"name": "bf16"},
    {"name": "fp8"},
    {"name": "int8"},
    {"name": "int4"},
    {"name": "sign"},
    {"name": "top_k", "keep": 0.01},
    {"name": "random_k", "keep": 0.01},
    {"name": "low_rank", "rank": 1},
]

# %% [markdown]
# One recipe for all, tuned for none of them. Bytes are read from the compiled program; on
# simulated devices they are right, and times would mean nothing.

# %%
rows = []
for reducer in reducers:
    for feedback in (False, True):
        if feedback and reducer["name"] == "none":
            continue  # nothing is lost
        comm = {"reducer": reducer | {"error_feedback": feedback}}
        summary = jmlp.train(base | {"comm": comm}, verbose=False).summary
        name = " ".join(map(str, reducer.values())) + (" + feedback" if feedback else "")
        accuracy, sent = summary["test"]["accuracy"], summary["wire_bytes_per_step"]
        rows.append({"name": name, "bytes": sent, "mean": accuracy, "spread": 0.0})
        share = sent / rows[0]["bytes"]
        print(f"{name:24} accuracy {accuracy:.3f}   {sent:7,} bytes a step, {share:.3f} of none")

# %%
from jmlp import plots

plots.bytes_and_accuracy(rows, "digits, 64-128-10 over 8 devices, 4 epochs, one seed", below=0.2)

# %% [markdown]
# Down to four bits nothing is lost. Below, error feedback decides: a sign, a top 1 % of the numbers
# or a single rank, fed back, come close to the whole gradient at a few hundredths of its bytes. One
# seed of a small data set has noise of a percent or so: `jmlp bench compress` does the same on
# Fashion-MNIST over several seeds, and its table is in docs/benchmarks.md.
#
# ## What travels
#
# The ledger lists every collective of a compiled step. int8 has two: each device sends every
# other its share in codes, adds up what comes in, and sends the coded sum to all.

# %%
from jmlp.analysis import ledger

pairs = (
    ledger.combinations(["ring"], ["none"])
    + ledger.combinations(["full"], ["int8", "sign", "top_k"])
    + ledger.combinations(["ring"], ["low_rank"])
)
table = ledger.rows(pairs, [8], [250_000])
for row in table:
    print(
        f"{row['reducer']:9} over {row['topology']:5} {row['bytes_compiled']:10,} bytes   "
        f"{row['collectives']}"
    )

# %% [markdown]
# ## When it pays
#
# A compressor costs time of its own. It pays where the network is the limit and nowhere else:
# Agarwal et al. 2022 (arXiv:2103.00543) found a gain in 6 of more than 200 set-ups. top_k
# gathers from all devices, so its bytes grow with n; the ring below does not.

# %%
grown = ledger.rows([("ring", "none"), ("full", "int8"), ("full", "top_k")], [2, 4, 8], [250_000])
plots.table(grown)
