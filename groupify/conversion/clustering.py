"""Choose which channels form a group: coordinate ascent over the permutation classes.

Each class in turn is put into the order that keeps the most of what flows through its convs while
the others stay; each such step is a balanced assignment problem (channels to groups of fixed size).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from groupify.conversion.surgery import SiteRecipe
from groupify.graph.channels import CONV_INPUT, CONV_OUTPUT, Channels
from groupify.graph.permute import use_order

_MAX_SWEEPS = 20


@dataclass(frozen=True)
class SiteScore:
    """How much of each output of a dense conv comes through each input.

    Attributes:
        site: the conv and its groups to be.
        score: shape (O, I), not negative.
    """

    site: SiteRecipe
    score: Tensor


@dataclass(frozen=True)
class Clustering:
    """The chosen channel orders.

    Attributes:
        orders: class index → order (see ``graph.apply_orders``).
        kept_before: share of the total score inside the groups with the given channel order.
        kept: the same with the chosen order.
    """

    orders: dict[int, Tensor]
    kept_before: float
    kept: float


def cluster(
    channels: Channels, scores: Sequence[SiteScore], *, restarts: int = 2, seed: int = 0
) -> Clustering:
    """Maximise the score inside the groups over all permutation classes.

    Args:
        channels: the model's permutation classes.
        scores: one entry for each site to be converted.
        restarts: number of random starts besides the given order.
        seed: seed of the random starts.
    """
    problem = _Problem(channels, scores)
    identity = {index: np.arange(channels.classes[index].size) for index in problem.classes}
    before = problem.objective(identity)
    best, best_value = problem.ascend(identity)
    generator = np.random.default_rng(seed)
    for _ in range(restarts):
        start = {index: generator.permutation(len(order)) for index, order in identity.items()}
        orders, value = problem.ascend(start)
        if value > best_value:
            best, best_value = orders, value
    total = problem.total or 1.0
    chosen = {index: torch.from_numpy(order) for index, order in best.items()}
    return Clustering(chosen, before / total, best_value / total)


@dataclass(frozen=True)
class _Side:
    """Where one class meets the inputs or the outputs of one site."""

    site: int
    positions: NDArray[np.int64]  # (size, repeats): channel positions of each place of the class
    is_input: bool


class _Problem:
    def __init__(self, channels: Channels, scores: Sequence[SiteScore]) -> None:
        self._channels = channels
        self._scores = [entry.score.float().numpy() for entry in scores]
        self._sites = [entry.site for entry in scores]
        self.total = float(sum(score.sum(dtype=np.float64) for score in self._scores))
        numbers = {entry.site.name: number for number, entry in enumerate(scores)}
        self._inputs: dict[int, int] = {}
        self._outputs: dict[int, int] = {}
        for index, use in enumerate(channels.uses):
            if use.name in numbers and use.kind in (CONV_INPUT, CONV_OUTPUT):
                side = self._inputs if use.kind == CONV_INPUT else self._outputs
                side[numbers[use.name]] = index
        self._sides: dict[int, list[_Side]] = {}
        for class_index, channel_class in enumerate(channels.classes):
            sides = [
                _Side(number, channel_class.places[use].numpy(), is_input)
                for uses, is_input in ((self._inputs, True), (self._outputs, False))
                for number, use in uses.items()
                if use in channel_class.places
            ]
            if sides:
                self._sides[class_index] = sides
        self.classes = list(self._sides)
        self._in_groups = [self._input_groups(number) for number in range(len(scores))]
        self._out_groups = [self._output_groups(number) for number in range(len(scores))]
        # Positions of the first group, then those of the second, and so on.
        self._in_members = [np.argsort(groups, kind="stable") for groups in self._in_groups]
        self._out_members = [np.argsort(groups, kind="stable") for groups in self._out_groups]

    def _input_groups(self, number: int) -> NDArray[np.int64]:
        channels = self._scores[number].shape[1]
        return _contiguous(channels, self._sites[number].groups)

    def _output_groups(self, number: int) -> NDArray[np.int64]:
        channels, site = self._scores[number].shape[0], self._sites[number]
        if site.shuffle:
            return np.arange(channels, dtype=np.int64) % np.int64(site.groups)
        return _contiguous(channels, site.groups)

    def _arranged(
        self, number: int, orders: Mapping[int, NDArray[np.int64]]
    ) -> tuple[NDArray[np.int64], ...]:
        """Original channel at each input and each output position of a site."""
        tensors = {index: torch.from_numpy(order) for index, order in orders.items()}
        sides = []
        for uses, axis in ((self._inputs, 1), (self._outputs, 0)):
            use = uses.get(number)
            length = self._scores[number].shape[axis]
            sides.append(
                np.arange(length) if use is None else use_order(self._channels, use, tensors).numpy()
            )
        return tuple(sides)

    def _site_value(self, number: int, orders: Mapping[int, NDArray[np.int64]]) -> float:
        inputs, outputs = self._arranged(number, orders)
        groups, score = self._sites[number].groups, self._scores[number]
        inputs = inputs[self._in_members[number]].reshape(groups, -1)
        outputs = outputs[self._out_members[number]].reshape(groups, -1)
        return float(sum(score[np.ix_(outputs[g], inputs[g])].sum(dtype=np.float64) for g in range(groups)))

    def objective(self, orders: Mapping[int, NDArray[np.int64]]) -> float:
        return sum(self._site_value(number, orders) for number in range(len(self._sites)))

    def ascend(self, start: Mapping[int, NDArray[np.int64]]) -> tuple[dict[int, NDArray[np.int64]], float]:
        orders = dict(start)
        for _ in range(_MAX_SWEEPS):
            improved = False
            for class_index in self.classes:
                touched = sorted({side.site for side in self._sides[class_index]})
                before = sum(self._site_value(number, orders) for number in touched)
                candidate = {**orders, class_index: self._best_order(class_index, orders)}
                after = sum(self._site_value(number, candidate) for number in touched)
                # Where one class is both input and output of a conv the step is only linearised.
                if after > before * (1 + 1e-6) + 1e-12:
                    orders, improved = candidate, True
            if not improved:
                break
        return orders, self.objective(orders)

    def _best_order(self, class_index: int, orders: Mapping[int, NDArray[np.int64]]) -> NDArray[np.int64]:
        """Assign the channels of one class to its places, the other classes fixed."""
        size = self._channels.classes[class_index].size
        columns = []  # group of each place, for each side and repeat
        benefits = []  # (size, groups): value of each channel in each group
        for side in self._sides[class_index]:
            score, groups = self._scores[side.site], self._sites[side.site].groups
            inputs, outputs = self._arranged(side.site, orders)
            for repeat in range(side.positions.shape[1]):
                positions = side.positions[:, repeat]
                if side.is_input:
                    ordered = score[outputs[self._out_members[side.site]]].reshape(groups, -1, score.shape[1])
                    value = ordered.sum(1)[:, positions].T
                    columns.append(self._in_groups[side.site][positions])
                else:
                    ordered = score[:, inputs[self._in_members[side.site]]].reshape(len(score), groups, -1)
                    value = ordered.sum(2)[positions]
                    columns.append(self._out_groups[side.site][positions])
                benefits.append(value)
        cells, cell_of_place = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
        cell_of_place = cell_of_place.reshape(-1)
        value = sum(
            benefit.astype(np.float64)[:, cells[:, number]] for number, benefit in enumerate(benefits)
        )
        current = orders[class_index]
        channel_cells = np.empty(size, dtype=np.int64)
        channel_cells[current] = cell_of_place
        assigned = balanced_assignment(np.asarray(value), np.bincount(cell_of_place), channel_cells)
        order = np.empty(size, dtype=np.int64)
        for cell in range(len(cells)):
            # Inside a cell the places are equal: channels keep their present relative order.
            members = [channel for channel in current.tolist() if assigned[channel] == cell]
            order[cell_of_place == cell] = members
        return order


def _contiguous(channels: int, groups: int) -> NDArray[np.int64]:
    """Group of each channel when groups are runs of neighbours."""
    return np.repeat(np.arange(groups, dtype=np.int64), channels // groups)


def balanced_assignment(
    value: NDArray[np.float64], capacities: NDArray[np.int64], start: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Assign items to cells of fixed capacity with the largest total value.

    Args:
        value: value of each item in each cell, shape (items, cells).
        capacities: places of each cell, shape (cells,), summing to the number of items.
        start: present cell of each item, shape (items,); kept where it is as good.

    Returns:
        Cell of each item, shape (items,).
    """
    repeated = np.repeat(np.arange(len(capacities)), capacities)
    # A hair's breadth for staying: ties would otherwise shuffle channels for nothing.
    value = value.copy()
    value[np.arange(len(start)), start] += 1e-9 * (1 + np.abs(value).max())
    rows, places = linear_sum_assignment(value[:, repeated], maximize=True)
    assigned = np.empty(len(rows), dtype=np.int64)
    assigned[rows] = repeated[places]
    return assigned
