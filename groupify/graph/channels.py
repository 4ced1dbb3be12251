"""The permutation classes of a model: which channels may change places, and where that shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from groupify.graph.atoms import Atoms
from groupify.graph.labelling import Labeller
from groupify.graph.uses import (
    CONV_INPUT,
    CONV_OUTPUT,
    LINEAR_INPUT,
    LINEAR_OUTPUT,
    PER_CHANNEL,
    ChannelUse,
)

__all__ = [
    "CONV_INPUT",
    "CONV_OUTPUT",
    "LINEAR_INPUT",
    "LINEAR_OUTPUT",
    "PER_CHANNEL",
    "ChannelClass",
    "ChannelUse",
    "Channels",
    "channel_classes",
]


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
    """All uses, and the classes of two or more channels."""

    uses: tuple[ChannelUse, ...]
    classes: tuple[ChannelClass, ...]


def channel_classes(traced: fx.GraphModule, example: Tensor) -> Channels:
    """Find the permutation classes of a traced model.

    Args:
        traced: the model's graph, in inference mode.
        example: an input, shape (N, C, H, W); one forward pass is run on it.
    """
    labeller = Labeller(traced)
    with torch.no_grad():
        labeller.run(example)
    untouchable = _untouchable(traced, labeller)
    for use in labeller.uses.values():
        if use.name in untouchable:
            labeller.atoms.freeze(use.atoms)
    return _group(labeller.atoms, list(labeller.uses.values()))


def _group(atoms: Atoms, uses: Sequence[ChannelUse]) -> Channels:
    """Put the components that meet the same parameters in the same way into one class."""
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
    return Channels(tuple(relabelled), tuple(classes))


def _untouchable(traced: nn.Module, labeller: Labeller) -> set[str]:
    """Names of uses whose parameters are also used in another way, so that they would be permuted twice."""
    modules = dict(traced.named_modules())
    regions: list[tuple[int, int, str]] = []
    for name in dict.fromkeys((*(use.name for use in labeller.uses.values()), *labeller.opaque)):
        recurse = name in labeller.opaque
        for tensor in _tensors_of(modules, name, recurse):
            if tensor.numel():
                start = tensor.data_ptr()
                regions.append((start, start + tensor.numel() * tensor.element_size(), name))
    regions.sort()
    found = set(labeller.opaque)
    for index, (_, end, name) in enumerate(regions):
        for start, _, other in regions[index + 1 :]:
            if start >= end:
                break
            if other != name:
                found |= {name, other}
    return found


def _tensors_of(modules: dict[str, nn.Module], name: str, recurse: bool) -> Iterable[Tensor]:
    module = modules.get(name)
    if module is not None:
        return (*module.parameters(recurse), *module.buffers(recurse))
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(modules.get(owner), attribute, None)
    return (tensor,) if isinstance(tensor, Tensor) else ()
