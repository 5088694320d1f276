"""Checkpoints: orbax behind digests of our own, on any mesh.

saving, restoring, keeping the best: `checkpoints`. digests, the fingerprint, copies on devices
compared: `digest`. states as files' leaves: `leaves`. what is said beside them: `meta`. another
number of devices: `resize`.
"""
