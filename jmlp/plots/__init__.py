"""Pictures, each a function that returns its figure. `pip install 'jmlp[plots]'`.

In a notebook a cell that ends with a figure shows it; elsewhere `save(figure, path)`.
"""

from jmlp.plots.bench import bench, bytes_and_accuracy
from jmlp.plots.comm import costs, messages, table
from jmlp.plots.layouts import layouts, memory
from jmlp.plots.pipeline import bubble, schedule
from jmlp.plots.plans import plan_memory, plan_time, roofline
from jmlp.plots.run import (
    compare,
    confusion,
    evaluation,
    images,
    predicted_against_true,
    run_curves,
    staleness,
)
from jmlp.plots.style import Figure, check, save
from jmlp.plots.sweep import sweep

__all__ = [
    "Figure", "bench", "bubble", "bytes_and_accuracy", "check", "compare", "confusion", "costs",
    "evaluation", "images", "layouts", "memory", "messages", "plan_memory", "plan_time",
    "predicted_against_true", "roofline", "run_curves", "save", "schedule", "staleness", "sweep",
    "table",
]  # fmt: skip
