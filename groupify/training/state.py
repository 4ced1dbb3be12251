"""The state of a training run: its random generators, and all of it on disk.

A killed run goes on as if nothing had happened. The file is one of safetensors: tensors, and all the rest as
JSON in its metadata; reading it runs no code. The generators are torch's, Python's and NumPy's global ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from groupify.documents import Amount, Count, Document
from groupify.errors import ArtefactError, SpecError
from groupify.files import read_tensors
from groupify.training.history import FinetuneRow
from groupify.training.validation import Validation


@dataclass(frozen=True)
class Checkpointing:
    """When to store the state of a training run, and whether to go on from it.

    Attributes:
        file: the state; replaced as a whole, never written in place. Left behind when the run ends.
        interval: steps between two writes; the end of the run is one more.
        resume: go on from the file if it exists; else begin, whatever is there.

    Raises:
        SpecError: an interval below 1.
    """

    file: Path
    interval: int = 200
    resume: bool = False

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise SpecError(f"the state is to be saved every {self.interval} steps; expected 1 or more")


@dataclass(frozen=True)
class TrainingState(Document):
    """Where a training run stands, apart from its tensors.

    Attributes:
        run: what must be the same for a state to belong to a run; JSON values.
        step: steps done.
        epoch, next_batch: the pass and the batch in it that come next.
        checksum: of the labels in the pass so far, for data without indices.
        seconds: training time since the last row of the history, and since the last line of the log.
        history: one row for each validation.
        best_step: which of them is the best.
        validation: the last one.
        libraries: see ``library_states``; empty where several processes trained.
    """

    what: ClassVar[str] = "training state"
    remedy: ClassVar[str] = "remove it"
    plain_texts: ClassVar[bool] = False

    format: Literal["groupify-training-state"] = field(default="groupify-training-state", kw_only=True)
    schema_version: Literal[3] = field(default=3, kw_only=True)
    run: Mapping[str, Any]
    step: Count
    epoch: Count
    next_batch: Count
    checksum: int
    seconds: tuple[Amount, Amount]
    history: tuple[FinetuneRow, ...]
    best_step: Count
    validation: Validation
    libraries: Mapping[str, Any]


def write_state(path: Path, tensors: Mapping[str, Tensor], state: TrainingState) -> None:
    """Write a state aside, then rename it: at any moment the file is a whole one.

    Raises:
        ArtefactError: it cannot be written.
    """
    metadata = {"state": state.dumps()}
    # Clones: tensors of one model may share memory, which the format does not know.
    values = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    aside = path.with_name(f".{path.name}.partial")
    try:
        save_file(values, aside, metadata)
        with aside.open("rb+") as file:  # Windows syncs no file that is open for reading only
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"cannot write the training state {path}: {error}") from error


def read_state(path: Path) -> tuple[dict[str, Tensor], TrainingState]:
    """Read a state.

    Raises:
        ArtefactError: no state, or a damaged one.
    """
    try:
        tensors, metadata = read_tensors(path)
        if "state" not in metadata:
            raise ArtefactError(f"{path} is no training state; give another file, or remove it")
        return tensors, TrainingState.loads(metadata["state"])
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"cannot read the training state {path}: {error}; remove it") from error


def check_same_run(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a state that another run has left.

    Raises:
        SpecError: names the first difference.
    """
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise SpecError(
                f"{path} is the state of another run: its {key.replace('_', ' ')} is {stored.get(key)!r}, "
                f"not {value!r}; give the same arguments, or remove the file to begin anew"
            )


def hash_of(model: nn.Module) -> str:
    """Return a hash of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimizer keeps of each parameter, by ``number.name``."""
    return {
        f"{number}.{name}": value
        for number, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def set_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put ``optimizer_tensors`` back."""
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape and value.dim() > 0:
            # In the parameter's memory format: another one could round otherwise.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        optimizer.state[parameter][name] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put a prefix before all names."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, under their names without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def seed_all(seed: int) -> None:
    """Seed all global generators."""
    torch.manual_seed(seed)  # of every device
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def own_random_states(device: torch.device, generators: list[torch.Generator]) -> Iterator[None]:
    """Give all generators, the given ones too, their states back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    states = [generator.get_state() for generator in generators]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def torch_states(device: torch.device, augmentation: torch.Generator) -> list[Tensor]:
    """Return the states of torch's generators, each uint8 of shape (n,)."""
    states = [torch.get_rng_state(), augmentation.get_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_torch_states(states: list[Tensor], device: torch.device, augmentation: torch.Generator) -> None:
    """Put ``torch_states`` back."""
    torch.set_rng_state(states[0])
    augmentation.set_state(states[1])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[2], device)


def library_states() -> dict[str, Any]:
    """Return the states of Python's and NumPy's generators, as JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
    }


def set_library_states(states: Mapping[str, Any]) -> None:
    """Put ``library_states`` back."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
