"""Choose which channels form a group: coordinate ascent over the permutation classes.

Each class in turn is put into the order that is worth the most to its convs while the others stay;
each such step is a balanced assignment problem (channels to groups of fixed size).

Where an expand mixes the outputs of all groups, only the inputs are grouped: those that move the outputs in
the same few directions (K-subspaces, Bradley and Mangasarian 2000, with groups of equal size).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groupify.conversion.assignment import balanced_assignment
from groupify.graph.channels import Channels
from groupify.structures import SiteRecipe

_MAX_SWEEPS = 20

_Orders = Mapping[int, NDArray[np.int64]]
_Membership = NDArray[np.float32]  # ones at the channels of each group, shape (groups, channels)
_Benefits = NDArray[np.float64]


@dataclass(frozen=True)
class SiteScore:
    """How much of each output of a dense conv comes through each input.

    Attributes:
        site: the conv and its groups to be.
        score: shape (O, I), not negative.
        directions: for a 1×1 conv that becomes one with an expand, how each input moves the outputs: the
            root of the score with the sign of the weight, shape (O, I).
    """

    site: SiteRecipe
    score: Tensor
    directions: Tensor | None = None

    @classmethod
    def of(cls, site: SiteRecipe, score: Tensor, weight: Tensor) -> SiteScore:
        """Return what decides the groups of a site of a weight, shape (O, I, *kernel); on the CPU."""
        score, weight = score.cpu(), weight.detach().cpu()
        if site.structure.expand is None:
            return cls(site, score)
        return cls(site, score, score.sqrt() * weight.flatten(1).sign())


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
    flows = [_flow(entry) for entry in scores]
    problem = _Problem(channels, [entry.site for entry in scores], flows)
    identity = problem.identity()
    before = problem.objective(identity)
    best, best_value = problem.ascend(identity)
    generator = np.random.default_rng(seed)
    for _ in range(restarts):
        start = {index: generator.permutation(len(order)) for index, order in identity.items()}
        orders, value = problem.ascend(start)
        if value > best_value:
            best, best_value = orders, value
    total = sum(flow.total for flow in flows) or 1.0
    chosen = {index: torch.from_numpy(order) for index, order in best.items()}
    return Clustering(chosen, before / total, best_value / total)


class _Flow:
    """What flows inside the groups of one site, each input taken for itself.

    Args:
        score: how much of each output comes through each input, shape (O, I), not negative.
    """

    def __init__(self, score: Tensor) -> None:
        self._score = score.float().numpy()
        self.out_channels, self.in_channels = self._score.shape
        self.total = float(self._score.sum(dtype=np.float64))

    def value(self, inputs: _Membership, outputs: _Membership) -> float:
        """Return the score inside the groups."""
        return float(((outputs @ self._score) * inputs).sum(dtype=np.float64))

    def input_benefits(self, inputs: _Membership, outputs: _Membership) -> _Benefits:
        """Return what each input is worth in each group, shape (I, groups)."""
        del inputs
        return np.asarray((outputs @ self._score).T, dtype=np.float64)

    def output_benefits(self, inputs: _Membership) -> _Benefits:
        """Return what each output is worth in each group, shape (O, groups)."""
        return np.asarray(self._score @ inputs.T, dtype=np.float64)


class _Subspaces:
    """What the inputs of each group of one site bring about in as many directions as the group has latents.

    Args:
        directions: how each input moves the outputs, shape (O, I).
        rank: latents that a group writes.
    """

    def __init__(self, directions: Tensor, rank: int) -> None:
        self._directions = directions.float()
        self._rank = rank
        self.out_channels, self.in_channels = self._directions.shape
        self.total = float(self._directions.double().square().sum())

    def value(self, inputs: _Membership, outputs: _Membership) -> float:
        """Return what is left when each group keeps its best directions."""
        del outputs
        return sum(float(self._leading(members)[0]) for members in inputs)

    def input_benefits(self, inputs: _Membership, outputs: _Membership) -> _Benefits:
        """Return how much of each input the directions of each group hold, shape (I, groups)."""
        del outputs
        held = [(self._leading(members)[1].T @ self._directions).square().sum(0) for members in inputs]
        return np.asarray(torch.stack(held, 1), dtype=np.float64)

    def _leading(self, members: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
        """The energy in the best directions of some inputs, and these, shape (O, rank)."""
        columns = self._directions[:, torch.from_numpy(members > 0)]
        directions, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
        return sizes[: self._rank].square().sum(), directions[:, : self._rank]


def _flow(entry: SiteScore) -> _Flow | _Subspaces:
    if entry.directions is None:
        return _Flow(entry.score)
    assert entry.site.structure.expand is not None
    return _Subspaces(entry.directions, entry.site.structure.expand // entry.site.groups)


@dataclass(frozen=True)
class _Side:
    """Where one class meets the inputs or the outputs of one site."""

    site: int
    positions: NDArray[np.int64]  # (size, repeats): channel positions of each place of the class
    is_input: bool


@dataclass
class _End:
    """The inputs or the outputs of one site.

    Attributes:
        groups: group of each channel position, shape (channels,).
        membership: one row for each group, 1 at its positions, shape (groups, channels).
        classes: the classes that meet it, with the positions of their places.
    """

    groups: NDArray[np.int64]
    membership: NDArray[np.float32]
    classes: list[tuple[int, NDArray[np.int64]]]

    def membership_of_channels(self, orders: _Orders) -> NDArray[np.float32]:
        """Return ``membership`` with the columns in the order of the dense model's channels."""
        arranged = np.arange(len(self.groups))
        for class_index, positions in self.classes:
            arranged[positions] = positions[orders[class_index]]
        membership = np.empty_like(self.membership)
        membership[:, arranged] = self.membership
        return membership


class _Problem:
    def __init__(
        self, channels: Channels, sites: Sequence[SiteRecipe], flows: Sequence[_Flow | _Subspaces]
    ) -> None:
        self._flows = flows
        self._inputs, self._outputs = [], []
        for site, flow in zip(sites, flows, strict=True):
            self._inputs.append(_end(_contiguous(flow.in_channels, site.groups), site.groups))
            self._outputs.append(_end(_output_groups(flow.out_channels, site), site.groups))
        numbers = {site.name: number for number, site in enumerate(sites)}
        self._sides: dict[int, list[_Side]] = {}
        for class_index, channel_class in enumerate(channels.classes):
            for use, places in channel_class.places.items():
                name, dim = channels.uses[use].name, channels.uses[use].dim
                number = numbers.get(name.removesuffix(".weight"))
                if number is None or dim is None:
                    continue
                if dim == 0 and isinstance(flows[number], _Subspaces):
                    continue  # all outputs read all groups
                side = _Side(number, places.numpy(), dim == 1)
                self._sides.setdefault(class_index, []).append(side)
                end = self._inputs[number] if side.is_input else self._outputs[number]
                end.classes.append((class_index, side.positions))
        self.classes = list(self._sides)
        self._sizes = {index: channels.classes[index].size for index in self.classes}
        touched = {index: {side.site for side in sides} for index, sides in self._sides.items()}
        self._neighbours = {a: {b for b in touched if touched[a] & touched[b]} for a in touched}

    def identity(self) -> _Orders:
        return {index: np.arange(size) for index, size in self._sizes.items()}

    def _site_value(self, number: int, orders: _Orders) -> float:
        inputs, outputs = self._inputs[number], self._outputs[number]
        return self._flows[number].value(
            inputs.membership_of_channels(orders), outputs.membership_of_channels(orders)
        )

    def objective(self, orders: _Orders) -> float:
        return sum(self._site_value(number, orders) for number in range(len(self._flows)))

    def ascend(self, start: _Orders) -> tuple[_Orders, float]:
        orders = dict(start)
        stale = set(self.classes)
        for _ in range(_MAX_SWEEPS):
            for class_index in self.classes:
                if class_index not in stale:
                    continue
                stale.discard(class_index)
                better = self._better_order(class_index, orders)
                if better is not None:
                    orders[class_index] = better
                    stale |= self._neighbours[class_index]
            if not stale:
                break
        return orders, self.objective(orders)

    def _better_order(self, class_index: int, orders: _Orders) -> NDArray[np.int64] | None:
        candidate = self._step(class_index, orders).order()
        if np.array_equal(candidate, orders[class_index]):
            return None
        touched = sorted({side.site for side in self._sides[class_index]})
        before = sum(self._site_value(number, orders) for number in touched)
        changed = {**orders, class_index: candidate}
        after = sum(self._site_value(number, changed) for number in touched)
        # Where one class is both input and output of a conv, the step is only linearised.
        return candidate if after > before * (1 + 1e-6) + 1e-12 else None

    def _step(self, class_index: int, orders: _Orders) -> _Step:
        """What each channel of one class is worth in each of its places, the other classes fixed."""
        columns: list[NDArray[np.int64]] = []  # group of each place, for each side and repeat
        benefits: list[_Benefits] = []  # (size, groups): value of each channel in each group
        for side in self._sides[class_index]:
            flow, inputs, outputs = self._flows[side.site], self._inputs[side.site], self._outputs[side.site]
            of_inputs, of_outputs = (end.membership_of_channels(orders) for end in (inputs, outputs))
            if side.is_input:
                values, groups = flow.input_benefits(of_inputs, of_outputs), inputs.groups
            else:
                assert isinstance(flow, _Flow)
                values, groups = flow.output_benefits(of_inputs), outputs.groups
            for positions in side.positions.T:
                columns.append(groups[positions])
                benefits.append(values[positions])
        cells, cell_of_place = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
        value = np.sum([benefit[:, cells[:, n]] for n, benefit in enumerate(benefits)], axis=0)
        return _Step(value, cell_of_place.reshape(-1), orders[class_index])


@dataclass(frozen=True)
class _Step:
    """One class to be ordered anew.

    Attributes:
        value: what each channel is worth in each cell (places that are equal), shape (size, cells).
        cell_of_place: shape (size,).
        current: the present order, channel of each place.
    """

    value: _Benefits
    cell_of_place: NDArray[np.int64]
    current: NDArray[np.int64]

    def order(self) -> NDArray[np.int64]:
        """Assign channels to places."""
        channel_cells = np.empty(len(self.current), dtype=np.int64)
        channel_cells[self.current] = self.cell_of_place
        assigned = balanced_assignment(self.value, np.bincount(self.cell_of_place), channel_cells)
        order = np.empty(len(self.current), dtype=np.int64)
        for cell in range(self.value.shape[1]):
            # Inside a cell the places are equal: channels keep their present relative order.
            order[self.cell_of_place == cell] = self.current[assigned[self.current] == cell]
        return order


def _contiguous(channels: int, groups: int) -> NDArray[np.int64]:
    """Group of each channel when groups are runs of neighbours."""
    return np.repeat(np.arange(groups, dtype=np.int64), channels // groups)


def _output_groups(channels: int, site: SiteRecipe) -> NDArray[np.int64]:
    if site.structure.expand is not None:
        return np.zeros(channels, dtype=np.int64)
    if site.shuffle:
        return np.arange(channels, dtype=np.int64) % np.int64(site.groups)
    return _contiguous(channels, site.groups)


def _end(groups_of: NDArray[np.int64], groups: int) -> _End:
    membership = (groups_of == np.arange(groups)[:, None]).astype(np.float32)
    return _End(groups_of, membership, [])
