"""Compressed means in float64; each takes (n, ...) gradients, and gives (mean, sent)."""

import numpy as np


def power_sgd(grads, q, spare):
    """Vogels et al. 2019, algorithm 1: P = mean M Q, orthonormal; Q = mean M^T P; P Q^T.

    A column of P that vanishes is drawn, `spare`; one of Q that does stays as it was.

    Args:
      grads: (n, a, b).
      q: (b, r), of the step before.
      spare: (a, r) random columns.

    Returns:
      (a, b) mean, (n, a, b) sent, (b, r) for the next step.
    """
    p, done = (grads @ q).mean(0), []
    for column, drawn in zip(p.T, spare.T, strict=True):
        left = column - sum((d @ column) * d for d in done)
        gone = np.linalg.norm(left) <= 1e-6 * np.linalg.norm(column)
        left = drawn - sum((d @ drawn) * d for d in done) if gone else left
        done.append(left / np.linalg.norm(left))
    p = np.stack(done, 1)
    own = grads.transpose(0, 2, 1) @ p
    found = own.mean(0)
    size = np.abs(found).max(0)
    return p @ found.T, p @ own.transpose(0, 2, 1), np.where(size <= 1e-6 * size.max(), q, found)


def dgc(grads, velocity, residual, momentum, keep):
    """Lin et al. 2018, algorithm 4 less clipping by device: momentum correction and masking.

    Args:
      grads, velocity, residual: (n, d).

    Returns:
      (d,) mean, (n, d) velocity, (n, d) residual.
    """
    u = momentum * velocity + grads
    v = residual + u
    k = max(1, round(keep * v.shape[1]))
    mask = np.zeros(v.shape, bool)
    for mine, row in zip(mask, np.abs(v), strict=True):
        mine[np.argsort(-row, kind="stable")[:k]] = True
    return (v * mask).mean(0), np.where(mask & (v != 0), 0, u), np.where(mask, 0, v)


def scaled_sign(v, block=512):
    """Karimireddy et al. 2019, algorithm 1: |v|_1 / d sign(v), here of each block."""
    parts = [v[at : at + block] for at in range(0, len(v), block)]
    return np.concatenate([np.where(p >= 0, 1, -1) * np.abs(p).mean() for p in parts])


def levels(largest, block=256):
    """QSGD's grid (Alistarh et al. 2017) with the largest of a block as its scale; nearest."""

    def code(v):
        parts = [v[at : at + block] for at in range(0, len(v), block)]
        scales = [np.float32(np.abs(p).max()) / np.float32(largest) for p in parts]
        return np.concatenate([
            np.floor(p / s + 0.5) * s if s > 0 else np.zeros_like(p)
            for p, s in zip(parts, scales, strict=True)
        ])  # fmt: skip

    return code


def two_phase(grads, code):
    """EQuARX (Ibrahim et al. 2025), ZeRO++ (Wang et al. 2023): to owners in code, and back in code.

    An owner's addend never travels; what the second code loses is the owner's.

    Args:
      grads: (n, d); device i owns the i-th of n shares.
      code: (d,) -> (d,), what arrives.
    """
    n, size = grads.shape
    width = -(-size // n)
    mean, sent = np.zeros(size), np.zeros((n, size))
    for owner in range(n):
        part = slice(owner * width, min((owner + 1) * width, size))
        if part.start >= size:
            continue
        for device in range(n):
            row = grads[device, part]
            sent[device, part] = row if device == owner else code(row)
        true = sent[:, part].mean(0)
        mean[part] = code(true)
        sent[owner, part] -= n * (true - mean[part])
    return mean, sent


def around_ring(grads, code):
    """The same along a ring: each hop adds what has arrived and encodes anew; senders lose it."""
    n, size = grads.shape
    width = -(-size // n)
    mean, sent = np.zeros(size), grads.copy()
    for owner in range(n):
        part = slice(owner * width, min((owner + 1) * width, size))
        if part.start >= size:
            continue
        total = np.zeros(part.stop - part.start)
        for hop in range(n - 1):  # from the owner's right neighbour round to the owner
            device = (owner + 1 + hop) % n
            whole = total + grads[device, part]
            total = code(whole)
            sent[device, part] -= whole - total
        total = total + grads[owner, part]
        mean[part] = code(total / n)
        sent[owner, part] -= total - n * mean[part]
    return mean, sent


def fed_back(mean, grads, residual):
    """Karimireddy et al. 2019, algorithm 2: what was not sent is added to the next gradient."""
    wanted = grads + residual
    found, sent = mean(wanted)
    return found, wanted - sent
