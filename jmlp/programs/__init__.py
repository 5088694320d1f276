"""What is compiled and run on devices.

training, many steps a dispatch: `train`. evaluation, metrics: `evaluation`. raw rows in,
predictions out: `predictions`. rows and batches on devices: `placement`. all of training as one
value: `bundle`. what a compiled program sends: `collectives`. the compilation cache: `cache`.
matrix products on CPUs: `kernels`. 32 bits whatever jax's flags say: `precision`. versions and
processor: `environment`.
"""
