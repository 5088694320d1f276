"""A trained model for other programs: columns, layers and units in one file.

which format is which, and the check against `predict` before a file is written: `run`. an ONNX
graph: `onnx_graph` (how nodes are added), `onnx_columns` (raw rows in), `onnx_model` (layers,
predictions out). a program for XLA: `stablehlo`. weights alone, as PyTorch names and lays them
out: `weights`.
"""
