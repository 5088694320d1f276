"""A run, from its config to its directory.

`train`: `run`. mesh, data, programs: `setup`. which steps are when: `plan`. the loop: `loop`.
batches to devices, prefetch: `feed`. callbacks, hooks of one's own: `callbacks`; the built-in
ones (log, TensorBoard, progress bar, early stopping): `hooks`. the best weights: `best`.
resuming: `resume`. another run's weights: `transfer`; patterns on parameters: `patterns`.
settings that change nothing: `no_effect`. the run directory: `run_dir`, its files: `files`,
`events`, `summary`. Ctrl-C, SIGTERM: `interrupt`.
"""
