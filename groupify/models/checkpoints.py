"""Weights from files as training programs leave them: wrapped, prefixed, averaged, beside other things."""

from __future__ import annotations

import pickle  # for its exception alone
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from groupify.errors import CheckpointError, GroupifyWarning
from groupify.files import read_tensors
from groupify.models.weights import load_state, one_line

# Where training programs put the weights that they average, and the weights themselves: timm, torchvision's
# references, Lightning, BasicSR, Ultralytics and what people write by hand.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema")
_PLAIN = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights")
# What wrappers of torch put into keys, wherever they wrap: torch.compile, FSDP, activation checkpointing.
_WRAPPED = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."
# How torch names a class that it does not make from a file.
_REFUSED = re.compile(r"GLOBAL ([\w.]+) was not an allowed global")
# The counter of torch's AveragedModel.
_AVERAGED_COUNT = "n_averaged"


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of a torch file, in which no code is run.

    Wrappers such as ``{"state_dict": …}`` and what DataParallel and ``torch.compile`` put into keys are
    taken off. Of averaged and plain weights the averaged ones are taken.

    Raises:
        CheckpointError: the file is missing, corrupt, or holds no tensors by name.

    Warns:
        GroupifyWarning: the file holds averaged weights beside plain ones.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}: expected a safetensors or torch file")
    try:
        if path.suffix == ".safetensors":
            content: Any = read_tensors(path)[0]
        else:
            content = _read_torch_file(path)
    except CheckpointError:
        raise
    except (SafetensorError, OSError, EOFError) as error:
        raise CheckpointError(f"{path} is corrupt or no checkpoint: {one_line(error)}") from error
    except Exception as error:  # torch.load raises UnpicklingError, RuntimeError, KeyError, ...
        raise CheckpointError(
            f"{path} is corrupt, or holds more than tensors, which is not loaded for safety: "
            "save model.state_dict(), best as safetensors"
        ) from error
    return _without_wrappers_in_keys(_tensors(_unwrapped(content, path), path))


class _StandIn(dict[Any, Any]):
    """Takes the place of a class that a file names: remembers items, does nothing else."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Forget the attributes."""


def _read_torch_file(path: Path) -> Any:
    """Read a file with ``weights_only=True``; what is neither tensor nor container becomes a stand-in.

    So an ``argparse.Namespace`` or a number of NumPy beside the tensors is no obstacle, and neither is
    imported or called.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError as error:
        if "torchscript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript archive, a whole program: save model.state_dict(), best as "
                "safetensors"
            ) from error
        names = []  # the format from before torch 1.6, which names them one by one
    while True:
        try:
            with torch.serialization.safe_globals([_stand_in(name) for name in names]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = _REFUSED.search(str(error))
            if refused is None:
                raise
            name = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            if name in names:
                raise
            names.append(name)


def _stand_in(name: str) -> Any:
    """Return a class that is made in the place of another, as torch wants it."""
    module, _, own = name.rpartition(".")
    return type(own, (_StandIn,), {"__module__": module}), name


def _unwrapped(content: Any, path: Path) -> Any:
    while isinstance(content, Mapping):
        averaged = _first(content, _AVERAGED)
        plain = _first(content, _PLAIN)
        if averaged is not None and plain is not None:
            warnings.warn(
                f"{path} holds averaged weights ({averaged!r}) beside plain ones ({plain!r}): the averaged "
                "ones are taken; save the others in a file of their own to have those",
                GroupifyWarning,
                stacklevel=4,
            )
        key = averaged or plain
        if key is None:
            break
        content = content[key]
    return content


def _first(content: Mapping[Any, Any], keys: Iterable[str]) -> str | None:
    return next((key for key in keys if isinstance(content.get(key), Mapping) and content[key]), None)


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, _StandIn) and not content:
        raise CheckpointError(
            f"{path} holds a whole {type(content).__name__} with its code, which is not loaded for safety: "
            "save model.state_dict(), best as safetensors"
        )
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__}: expected tensors by name")
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: entry {key!r} is a {type(value).__name__}; expected tensors by name, "
                "as model.state_dict() gives them"
            )
    return {str(key): value for key, value in content.items()}


def _without_wrappers_in_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {_WRAPPED.sub("", key): value for key, value in state.items()}
    members = [key for key in state if key != _AVERAGED_COUNT]
    while members and all(key.startswith(_PARALLEL) for key in members):
        state = {_WRAPPED.sub("", key.removeprefix(_PARALLEL)): state[key] for key in members}
        members = list(state)
    return state


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a weight file into ``model``: see :func:`read_checkpoint`, :func:`of_model`, :func:`load_state`.

    Raises:
        CheckpointError: a file that is missing, corrupt or belongs to another model.
    """
    load_state(model, of_model(model, read_checkpoint(path), str(path)), str(path))


def of_model(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> Mapping[str, Tensor]:
    """Return what in ``state`` belongs to ``model``, where the model was a member of something larger.

    A Lightning module keeps the net as ``self.model``, beside a loss or metrics: all keys of the net begin
    with ``model.`` there. The prefix is whatever stands in front of all the keys that the model has.

    Raises:
        CheckpointError: the model is there several times. ``origin`` is named in the message.
    """
    expected = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    if not expected or expected[0] in state:
        return state
    prefixes = [
        key.removesuffix(expected[0])
        for key in state
        if key.endswith(f".{expected[0]}")
        and all(key.removesuffix(expected[0]) + name in state for name in expected)
    ]
    if len(prefixes) > 1:
        prefixes = _averaged_ones(sorted(prefixes), origin)
    if not prefixes:
        return state
    (prefix,) = prefixes
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _averaged_ones(prefixes: list[str], origin: str) -> list[str]:
    averaged = [prefix for prefix in prefixes if "ema" in re.split(r"[._]", prefix)]
    shown = " and ".join(repr(prefix) for prefix in prefixes)
    if len(averaged) != 1:
        raise CheckpointError(
            f"{origin} holds the model {len(prefixes)} times, as {shown}: save the one that is meant alone"
        )
    warnings.warn(
        f"{origin} holds the model as {shown}: the averaged weights {averaged[0]!r} are taken; save the "
        "others in a file of their own to have those",
        GroupifyWarning,
        stacklevel=4,
    )
    return averaged
