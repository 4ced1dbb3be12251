"""The permutation classes of a model: which channels may change places, and where that shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groupify.graph.atoms import Atoms
from groupify.graph.call import Call
from groupify.graph.labelling import ChannelUse, Labeller
from groupify.graph.model_graph import ModelGraph


@dataclass(frozen=True)
class ChannelClass:
    """Channels that may be put in any order together.

    Attributes:
        atoms: the interchangeable atoms, in their present order, shape (size,).
        places: for each use (index into the list of uses), the positions of each atom in it,
            shape (size, repeats).
    """

    atoms: Tensor
    places: dict[int, Tensor]

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.atoms)


@dataclass(frozen=True)
class Channels:
    """All uses, and the classes of two or more channels.

    Attributes:
        uses: where channels meet tensors.
        classes: channels that may change places.
        pinned_by: operators that are not known, and so keep the channels that they read in their order.
    """

    uses: tuple[ChannelUse, ...]
    classes: tuple[ChannelClass, ...]
    pinned_by: tuple[str, ...] = ()


def channel_classes(graph: ModelGraph, call: Call) -> Channels:
    """Find the permutation classes of a model.

    Args:
        graph: the model's graph.
        call: one batch; one forward pass is run on it.
    """
    labeller = Labeller(graph)
    with torch.no_grad():
        labeller.run(call)
    untouchable = _untouchable(graph, labeller)
    for use in labeller.uses.values():
        if use.name in untouchable or not graph.is_state(use.name):
            labeller.atoms.freeze(use.atoms)
    return _group(labeller.atoms, list(labeller.uses.values()), tuple(labeller.pinned_by))


def _group(atoms: Atoms, uses: Sequence[ChannelUse], pinned_by: tuple[str, ...]) -> Channels:
    """Put the components that meet the same tensors in the same way into one class."""
    components = atoms.components()
    lengths = [len(component) for component in components]
    members = np.array([atom for component in components for atom in component], dtype=np.int64)
    owner, rank = np.full(atoms.count, -1), np.zeros(atoms.count, dtype=np.int64)
    owner[members] = np.repeat(np.arange(len(components)), lengths)
    rank[members] = [number for length in lengths for number in range(length)]
    meetings = _meetings(uses, owner, rank, len(components))
    groups: dict[object, list[NDArray[np.int64]]] = defaultdict(list)
    firsts: dict[object, list[int]] = defaultdict(list)
    for component, signature, met in zip(components, atoms.signatures(components), meetings, strict=True):
        if len(met):
            key = signature, met[:, :3].tobytes()
            groups[key].append(met)
            firsts[key].append(component[0])
    classes = [_class(np.stack(met), firsts[key]) for key, met in groups.items() if len(met) > 1]
    # Atoms that move together go by one name from here on.
    first = np.arange(atoms.count)
    first[members] = np.repeat([component[0] for component in components], lengths)
    relabelled = [replace(use, atoms=torch.from_numpy(first[use.atoms.numpy()])) for use in uses]
    return Channels(tuple(relabelled), tuple(classes), pinned_by)


def _meetings(
    uses: Sequence[ChannelUse], owner: NDArray[np.int64], rank: NDArray[np.int64], count: int
) -> list[NDArray[np.int64]]:
    """Return where each component meets tensors: rows of use, block, rank of the atom in it, and position.

    Args:
        uses: all uses.
        owner: component of each atom; −1 where it may not move.
        rank: number of each atom in its component.
        count: number of components.
    """
    rows = [np.empty((0, 5), dtype=np.int64)]
    for index, use in enumerate(uses):
        found = use.atoms.numpy()
        position = np.flatnonzero(owner[found] >= 0)
        found, width = found[position], max(1, len(use.atoms) // use.blocks)
        columns = np.full(len(found), index), position // width, rank[found], position, owner[found]
        rows.append(np.stack(columns, 1))
    table = np.concatenate(rows)
    table = table[np.argsort(table[:, 4], kind="stable")]
    ends = np.cumsum(np.bincount(table[:, 4], minlength=count))
    return np.split(table[:, :4], ends[:-1]) if count else []


def _class(met: NDArray[np.int64], atoms: Sequence[int]) -> ChannelClass:
    """Return the class of components that meet the same, in the order of their places in the first use.

    Args:
        met: as in ``_meetings``, shape (components, meetings, 4).
        atoms: the first of each component.
    """
    uses, positions = met[0, :, 0], met[:, :, 3]
    order = sorted(range(len(met)), key=positions[:, uses == uses[0]].tolist().__getitem__)
    where = {
        int(use): torch.from_numpy(positions[order][:, uses == use]) for use in dict.fromkeys(uses.tolist())
    }
    return ChannelClass(torch.tensor(atoms)[order], where)


def _untouchable(graph: ModelGraph, labeller: Labeller) -> set[str]:
    """Names of tensors that are also read in another way, so that they would be permuted twice or wrongly."""
    found = set(labeller.opaque)
    sides: dict[str, set[bool]] = defaultdict(set)
    for use in labeller.uses.values():
        sides[use.name].add(use.dim is None)
    found |= {name for name, kinds in sides.items() if len(kinds) > 1}
    regions: list[tuple[int, int, str]] = []
    for name in dict.fromkeys((*sides, *labeller.opaque)):
        tensor = graph.tensor(name)
        if tensor.numel():
            start = tensor.data_ptr()
            regions.append((start, start + tensor.numel() * tensor.element_size(), name))
    regions.sort()
    for index, (_, end, name) in enumerate(regions):
        for start, _, other in regions[index + 1 :]:
            if start >= end:
                break
            found |= {name, other}
    return found
