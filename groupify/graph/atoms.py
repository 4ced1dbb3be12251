"""Atoms: the channels of the producers in a graph, and what must hold between them.

A label tensor holds, for each element of a value, the atom that it carries. Labels are kept
expanded (stride 0) along the dimensions where they do not change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The atom of all that must stay where it is: the image, constants, what an unknown operation returns.
FIXED = 0


class Atoms:
    """Atoms with the ties and marks that the operations of a graph put on them."""

    def __init__(self) -> None:
        self._parents = [FIXED]
        self._frozen = {FIXED}
        self._stamps = 0
        self._marks: list[NDArray[np.int64]] = []
        # (stamp, left atom, right atom) of each tie.
        self._ties: list[tuple[int, int, int]] = []
        self._meets: dict[int, set[int]] = defaultdict(set)
        self._factors: dict[int, float] = {}

    @property
    def count(self) -> int:
        """Number of atoms so far, the fixed one included."""
        return len(self._parents)

    def new(self, count: int) -> Tensor:
        """Return new atoms, shape (count,)."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def scaled(self, atoms: Tensor, factors: Tensor) -> Tensor:
        """Return new atoms for channels times constants that stay in their places; both shape (count,)."""
        scaled = self.new(len(atoms))
        self.tie(atoms, scaled)
        self._factors |= dict(zip(scaled.tolist(), (self.factors(atoms) * factors).tolist(), strict=True))
        return scaled

    def factors(self, atoms: Tensor) -> Tensor:
        """Return the constants that the values of some atoms are multiplied by, shape (count,)."""
        if not self._factors:
            return torch.ones(len(atoms), dtype=torch.float64)
        found = [self._factors.get(atom, 1.0) for atom in atoms.tolist()]
        return torch.tensor(found, dtype=torch.float64)

    def freeze_scaled(self, labels: Tensor) -> None:
        """Forbid those atoms of ``labels`` to move whose values are multiplied by constants."""
        if self._factors:
            self._frozen.update(atom for atom in distinct(labels) if atom in self._factors)

    def freeze(self, labels: Tensor) -> bool:
        """Forbid the atoms of ``labels`` to move; say whether that is news for one of them."""
        atoms = distinct(labels)
        news = any(atom not in self._frozen for atom in atoms)
        self._frozen.update(atoms)
        return news

    def mark(self, labels: Tensor) -> None:
        """Note that one operation gives out these atoms, so that they differ from all that it does not."""
        atoms = np.asarray(distinct(labels), dtype=np.int64)
        self._marks.append(atoms[atoms != FIXED])

    def tie(self, left: Tensor, right: Tensor) -> None:
        """Make the atoms at equal places of two label tensors of one shape move together."""
        self._stamps += 1
        for a, b in _pairs(left, right).tolist():
            if a == FIXED or b == FIXED:
                self._frozen.update((a, b))
            elif a != b:
                self._ties.append((self._stamps, a, b))
                root_a, root_b = self._root(a), self._root(b)
                if root_a != root_b:
                    self._parents[root_b] = root_a

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the labels of an elementwise operation, whose shapes may broadcast."""
        dims = max(left.dim(), right.dim())
        left, right = (x.reshape((1,) * (dims - x.dim()) + x.shape) for x in (left, right))
        shape = torch.broadcast_shapes(left.shape, right.shape)
        wide_left, wide_right = left.expand(shape), right.expand(shape)
        for fixed, other, wide in ((left, right, wide_right), (right, left, wide_left)):
            if distinct(fixed) == [FIXED]:
                # What is fixed changes along these dimensions, so what changes with it must stay too.
                if any(fixed.shape[dim] > 1 and varies(other, dim) for dim in range(dims)):
                    self.freeze(other)
                return wide
        left_many, right_many = (
            any(theirs.shape[dim] == 1 and varies(mine, dim) for dim in range(dims))
            for mine, theirs in ((left, right), (right, left))
        )
        pairs = _pairs(wide_left, wide_right)
        if left_many and right_many:
            return self._give_up(left, right, shape)
        if left_many or right_many:
            many, one = (pairs[:, 0], pairs[:, 1]) if left_many else (pairs[:, 1], pairs[:, 0])
            self._meet(many, one)
            return wide_left if left_many else wide_right
        left_repeats, right_repeats = (len(pairs) > len(torch.unique(pairs[:, side])) for side in (0, 1))
        if left_repeats and right_repeats:
            return self._give_up(left, right, shape)
        self.tie(wide_left, wide_right)
        if left_repeats and _is_one_to_one(vector(wide_left, 1)):
            return wide_left  # a map over the image goes along with the channels
        return wide_right if left_repeats else wide_left

    def _meet(self, many: Tensor, one: Tensor) -> None:
        """One value is broadcast over several channels: these may change places among themselves only."""
        self.freeze(one)
        if len(torch.unique(many)) < len(many):
            self.freeze(many)  # each of them meets several values; rare, and not worth its own rule
        for a, b in zip(many.tolist(), one.tolist(), strict=True):
            if a == FIXED or b == FIXED:
                self._frozen.add(a)
            self._meets[a].add(b)

    def _give_up(self, left: Tensor, right: Tensor, shape: torch.Size) -> Tensor:
        self.freeze(left)
        self.freeze(right)
        return fixed_labels(shape)

    # what came of it ---------------------------------------------------------------------------

    def _root(self, atom: int) -> int:
        root = atom
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[atom] != root:
            self._parents[atom], atom = root, self._parents[atom]
        return root

    def components(self) -> list[list[int]]:
        """Return the sets of atoms that move together and may move, each in ascending order."""
        members: dict[int, list[int]] = defaultdict(list)
        for atom in range(len(self._parents)):
            members[self._root(atom)].append(atom)
        frozen = {self._root(atom) for atom in self._frozen}
        return [atoms for root, atoms in members.items() if root not in frozen]

    def signatures(self, components: Iterable[list[int]]) -> list[object]:
        """Return what must be equal for two components to change places, atom by atom in their order."""
        colours = self._colours()
        ties: dict[int, set[tuple[int, int, int]]] = defaultdict(set)
        for stamp, a, b in self._ties:
            ties[self._root(a)].add((stamp, a, b))
        found: list[object] = []
        for members in components:
            rank = {atom: number for number, atom in enumerate(members)}
            inner = frozenset((stamp, rank[a], rank[b]) for stamp, a, b in ties[self._root(members[0])])
            met = tuple(
                tuple(sorted({self._root(b) for b in self._meets[atom]})) if atom in self._meets else ()
                for atom in members
            )
            found.append((tuple(colours[members].tolist()), inner, met))
        return found

    def _colours(self) -> NDArray[np.int64]:
        """Number the sets of atoms that the same operations gave out."""
        colours = np.zeros(len(self._parents), dtype=np.int64)
        count = 1
        for atoms in self._marks:
            before, colours[atoms] = np.unique(colours[atoms], return_inverse=True)
            colours[atoms] += count
            count += len(before)
        return colours


def fixed_labels(shape: torch.Size) -> Tensor:
    """Return labels of the fixed atom, without memory of their own."""
    return torch.full((1,) * len(shape), FIXED, dtype=torch.long).expand(shape)


def distinct(labels: Tensor) -> list[int]:
    """Return the atoms in a label tensor, ascending."""
    atoms: list[int] = torch.unique(thin(labels)[0]).tolist()
    return atoms


def _pairs(left: Tensor, right: Tensor) -> Tensor:
    """Return the distinct pairs of atoms at equal places, shape (pairs, 2)."""
    left, right = thin(left, right)
    keys = torch.unique((left.reshape(-1) << 32) | right.reshape(-1))
    return torch.stack([keys >> 32, keys & 0xFFFFFFFF], 1)


def thin(*labels: Tensor) -> tuple[Tensor, ...]:
    """Cut tensors of one shape down to size 1 along the dimensions where all are expanded."""
    for axis in range(labels[0].dim()):
        if labels[0].shape[axis] > 1 and all(x.stride(axis) == 0 for x in labels):
            labels = tuple(x.narrow(axis, 0, 1) for x in labels)
    return labels


def varies(labels: Tensor, dim: int) -> bool:
    """Whether the labels change along a dimension."""
    if labels.shape[dim] == 1 or labels.stride(dim) == 0:
        return False
    (labels,) = thin(labels)
    return not bool((labels == labels.narrow(dim, 0, 1)).all())


def vector(labels: Tensor, dim: int) -> Tensor | None:
    """Return the labels along ``dim`` if they are the same everywhere else, else None."""
    if labels.dim() <= dim or dim < 0 or labels.numel() == 0:
        return None
    others = [axis for axis in range(labels.dim()) if axis != dim]
    if any(varies(labels, axis) for axis in others):
        return None
    first = labels
    for axis in others:
        first = first.narrow(axis, 0, 1)
    return first.reshape(-1)


def _is_one_to_one(atoms: Tensor | None) -> bool:
    return atoms is not None and FIXED not in atoms and len(torch.unique(atoms)) == len(atoms)


def along(atoms: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """Expand a vector of atoms along ``dim`` to a shape without copying."""
    view = [1] * len(shape)
    view[dim] = len(atoms)
    return atoms.reshape(view).expand(shape)


def compress(labels: Tensor) -> Tensor:
    """Give back copied labels as an expanded vector where they change along dimension 1 only."""
    if labels.dim() < 3 or labels.stride(-1) == 0:
        return labels
    atoms = vector(labels, 1)
    return labels if atoms is None else along(atoms, 1, labels.shape)
