"""The permutation classes of a model: which channels may change places, and where that shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
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
    # component of each atom that may move, and the atom's number inside it
    owner = {atom: (number, rank) for number, c in enumerate(components) for rank, atom in enumerate(c)}
    places: list[dict[int, list[int]]] = [defaultdict(list) for _ in components]
    met: list[list[tuple[int, int, int]]] = [[] for _ in components]
    relabelled = []
    for index, use in enumerate(uses):
        width = max(1, len(use.atoms) // use.blocks)
        atoms_here = use.atoms.tolist()
        for position, atom in enumerate(atoms_here):
            if atom in owner:
                number, rank = owner[atom]
                places[number][index].append(position)
                met[number].append((index, position // width, rank))
        # Atoms that move together go by one name from here on.
        first = [components[owner[atom][0]][0] if atom in owner else atom for atom in atoms_here]
        relabelled.append(replace(use, atoms=torch.tensor(first, dtype=torch.long)))
    groups: dict[object, list[int]] = defaultdict(list)
    for number, signature in enumerate(atoms.signatures(components)):
        if met[number]:
            groups[signature, tuple(met[number])].append(number)
    classes = []
    for members in groups.values():
        if len(members) < 2:
            continue
        members.sort(key=lambda number: next(iter(places[number].values())))
        where = {index: torch.tensor([places[n][index] for n in members]) for index in places[members[0]]}
        classes.append(ChannelClass(torch.tensor([components[n][0] for n in members]), where))
    return Channels(tuple(relabelled), tuple(classes), pinned_by)


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
