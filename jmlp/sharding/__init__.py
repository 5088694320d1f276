"""Devices, meshes, and where arrays live.

simulated devices: `devices`. the mesh and its axes: `mesh`. rules from parameter paths to axes,
named sharding: `layout`. ZeRO-3, parameters split at rest: `fsdp`. Megatron's column- and row-
parallel layers: `tensor_parallel`.
"""
