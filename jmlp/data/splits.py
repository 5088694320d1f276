"""Which rows are held out, drawn class by class."""

import numpy as np


def draw(y: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Sorted row numbers of about `fraction` of each class, and exactly of the total.

    Shares are rounded by largest remainder. A class never gives its last row.
    """
    _, counts = np.unique(y, return_counts=True)
    quota = counts * fraction
    most = counts - 1
    take = np.minimum(np.floor(quota).astype(int), most)
    total = min(max(1, round(len(y) * fraction)), int(most.sum()))
    ranked = np.argsort(take - quota, kind="stable")
    take[ranked[take[ranked] < most[ranked]][: max(0, total - take.sum())]] += 1
    # What classes of one row could not give, the others do, by what they have left.
    room, rest = most - take, total - int(take.sum())
    if rest > 0:
        share = rest * room / room.sum()
        take += np.floor(share).astype(int)
        ranked = np.argsort(np.floor(share) - share, kind="stable")
        take[ranked[take[ranked] < most[ranked]][: total - take.sum()]] += 1
    groups = np.split(np.argsort(y, kind="stable"), np.cumsum(counts)[:-1])
    chosen = [rng.permutation(group)[:n] for group, n in zip(groups, take, strict=True)]
    return np.sort(np.concatenate(chosen))


def part_of_cut(y: np.ndarray, folds: int, part: int, rng: np.random.Generator) -> np.ndarray:
    """Sorted row numbers of one of `folds` parts, as alike in classes and in size as can be."""
    shuffled = rng.permutation(len(y))
    dealt = shuffled[np.argsort(y[shuffled], kind="stable")]  # class after class, like cards
    return np.sort(dealt[part::folds])
