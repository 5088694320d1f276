"""Files of rows, one format a file: `csv`, `parquet`, `npz`, `idx` (MNIST's), scikit-learn's
(`builtin`).

Tables with typed columns, whatever file they come from: `arrow`; which of them are read: `chosen`.
"""
