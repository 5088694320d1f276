"""Which members one program trains together: alike but for numbers, widths padded to one size.

More members a program are fewer programs to compile, and more padding to multiply by zero. Groups
are joined as long as that takes less time in all, by an estimate of both.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from jmlp.config import Config
from jmlp.population.numbers import MAY_BE_OFF, OPTIM, less_numbers
from jmlp.population.widths import cannot_be_padded, like_pattern, padded_widths
from jmlp.types import may_be_on

COMPILE_S = 4.0
"""of a program, on a core of today"""
_RATE = 10e9  # multiply-adds a second, of products as small as these
_OVERHEAD_S = 2e-6  # a member, layer and step: activations, optimizer, gathering


@dataclass
class Group:
    """Members that one program trains."""

    config: Config
    """what they share; `model.hidden` are the padded widths"""
    members: list[int]
    """places in the list that was grouped"""
    pads: bool
    waste: float
    """share of its multiply-adds that is of padding"""
    seconds: float
    """estimated, of training"""


def group_members(
    configs: Sequence[Config],
    features: Sequence[int],
    outputs: int,
    steps: Sequence[int],
    begun: Sequence[int] = (),
    compile_s: float = COMPILE_S,
) -> list[Group]:
    """The groups of members with these configs, costliest first.

    Args:
      features: that the first layer of each is given.
      outputs: of the models.
      steps: that each member is to be trained.
      begun: steps that each has behind it; none: 0. Members of a group have the same.
      compile_s: what a program more costs.
    """
    alike: dict[str, list[int]] = {}
    for at, config in enumerate(configs):
        behind = begun[at] if begun else 0
        alike.setdefault(f"{behind} {steps[at]} {_key(config, features[at])}", []).append(at)
    groups: list[Group] = []
    for members in alike.values():
        first = members[0]
        cost = _Cost(features[first], outputs, configs[first].train.batch_size, steps)
        groups += _joined(members, configs, cost, compile_s)
    return sorted(groups, key=lambda group: (-group.seconds, group.members))


def _key(config: Config, features: int) -> str:
    """What members of one program must have alike."""
    tree = less_numbers(config).model_dump(mode="json")
    hidden = config.model.hidden
    tree["seed"] = None
    model, smoothing = config.model, config.train.label_smoothing
    on = [may_be_on(rate) for rate in (model.dropout, model.input_dropout, smoothing)]
    tree["model"]["hidden"] = len(hidden)
    for name in OPTIM:
        value = getattr(config.optim, name)
        tree["optim"][name] = None if name in MAY_BE_OFF else value is None
    pattern = like_pattern(hidden, features) if config.model.residual else None
    fixed = hidden if cannot_be_padded(config.model, config.optim.name) else None
    return json.dumps([tree, on, pattern, fixed])


@dataclass(frozen=True)
class _Cost:
    """Estimated seconds of members alike but for widths."""

    features: int
    outputs: int
    batch: int
    steps: Sequence[int]
    """of each of all members"""

    def products(self, widths: Sequence[int]) -> int:
        """Multiply-adds of a row, forward."""
        sizes = [self.features, *widths, self.outputs]
        return sum(a * b for a, b in itertools.pairwise(sizes))

    def __call__(self, widths: Sequence[int], members: Sequence[int]) -> float:
        step = 3 * self.batch * self.products(widths) / _RATE + _OVERHEAD_S * (len(widths) + 2)
        return step * sum(self.steps[at] for at in members)


def _joined(
    members: Sequence[int], configs: Sequence[Config], cost: _Cost, compile_s: float
) -> list[Group]:
    """Groups of members alike but for widths, joined while the estimate of time falls."""
    buckets: dict[tuple[int, ...], list[int]] = {}
    for at in members:
        buckets.setdefault(tuple(map(_power_of_two, configs[at].model.hidden)), []).append(at)
    groups = {number: tuple(ats) for number, (_, ats) in enumerate(sorted(buckets.items()))}
    widest = {
        number: _widest([configs[at].model.hidden for at in groups[number]]) for number in groups
    }

    def saved(i: int, j: int) -> float:
        both = _widest([widest[i], widest[j]])
        apart = cost(widest[i], groups[i]) + cost(widest[j], groups[j])
        return compile_s + apart - cost(both, groups[i] + groups[j])

    heap = [(-saved(i, j), i, j) for i, j in itertools.combinations(groups, 2)]
    heapq.heapify(heap)
    number = len(groups)
    while heap:
        less, i, j = heapq.heappop(heap)
        if less >= 0:
            break
        if i not in groups or j not in groups:
            continue
        widest[number] = _widest([widest.pop(i), widest.pop(j)])
        groups[number] = groups.pop(i) + groups.pop(j)
        for other in groups:
            if other != number:
                heapq.heappush(heap, (-saved(other, number), other, number))
        number += 1
    return [_group(sorted(ats), configs, cost) for ats in groups.values()]


def _group(members: list[int], configs: Sequence[Config], cost: _Cost) -> Group:
    first = configs[members[0]]
    hidden = [configs[at].model.hidden for at in members]
    widths = padded_widths(hidden, cost.features, first.model.residual)
    model = first.model.model_copy(update={"hidden": widths})
    true = sum(cost.products(one) for one in hidden)
    return Group(
        config=first.model_copy(update={"model": model}),
        members=members,
        pads=any(one != widths for one in hidden),
        waste=1 - true / (cost.products(widths) * len(members)),
        seconds=cost(widths, members),
    )


def _widest(hidden: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(max(widths) for widths in zip(*hidden, strict=True))


def _power_of_two(width: int) -> int:
    return 1 << max(3, (width - 1).bit_length())
