"""Weights into models, checked before anything is loaded, and weights from torchvision's hub."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from groupify.errors import CheckpointError, SpecError

_STATISTICS = ("running_mean", "running_var")
_PROBE_SECONDS = 5.0
_STALL_SECONDS = 30.0


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def load_state(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load tensors into ``model``, cast to the model's types; nothing is loaded if any does not fit.

    Raises:
        CheckpointError: names the first key that is missing, has another shape or kind, holds NaN or
            infinite values, or that the model does not have. ``origin`` is named in the message.
    """
    expected = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    state = {_key_in(expected, key): value for key, value in state.items()}
    fitting = {}
    for key, own in expected.items():
        if key not in state:
            # Checkpoints older than this counter of batch norm lack it; nothing reads it in eval mode.
            if key.endswith("num_batches_tracked"):
                fitting[key] = own
                continue
            raise CheckpointError(
                f"{origin} has no {key!r}, which the model has with shape {tuple(own.shape)}: "
                "it belongs to another model"
            )
        value = state[key]
        if value.shape != own.shape:
            raise CheckpointError(
                f"{origin}: {key!r} has shape {tuple(value.shape)}, the model's has {tuple(own.shape)}: "
                "it belongs to another model or number of classes"
            )
        if value.is_floating_point() != own.is_floating_point() or value.is_quantized:
            raise CheckpointError(f"{origin}: {key!r} is {value.dtype}, the model's is {own.dtype}")
        fitting[key] = value.to(own.dtype)
    unsound = first_unsound(model, fitting)
    if unsound is not None:
        raise CheckpointError(f"{origin}: {unsound!r} holds NaN or infinite values: the training diverged")
    unexpected = next((key for key in state if key not in expected), None)
    if unexpected is not None:
        raise CheckpointError(
            f"{origin} has {unexpected!r} of shape {tuple(state[unexpected].shape)}, the model does not: "
            "it belongs to another model"
        )
    model.load_state_dict(fitting, strict=False)


def _key_in(expected: Mapping[str, Tensor], key: str) -> str:
    """The model's own name of a tensor that was saved with a part of the model in DataParallel."""
    if key in expected:
        return key
    plain = ".".join(part for part in key.split(".") if part != "module")
    return plain if plain in expected else key


def first_unsound(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> str | None:
    """Return the name of the first tensor with values that no sound training gives; None if all are sound.

    NaN in a parameter, infinity in one that is trained or belongs to a layer of torch, and either in the
    statistics of a norm. Other buffers, and frozen parameters of the user's own modules, hold infinity on
    purpose: attention masks, the bounds of an observer.

    Args:
        model: where the tensors belong.
        tensors: values by name, of which the model need not have any yet; None = the model's own.
    """
    for prefix, module in model.named_modules():
        layer_of_torch = type(module).__module__.startswith("torch.nn")
        for name, own in (*module._parameters.items(), *module._buffers.items()):
            key = f"{prefix}.{name}" if prefix else name
            value = own if tensors is None else tensors.get(key)
            if own is None or value is None or not value.is_floating_point():
                continue
            parameter = name in module._parameters
            if parameter and bool(value.isnan().any()):
                return key
            bounded = own.requires_grad or layer_of_torch if parameter else name in _STATISTICS
            if bounded and not bool(value.isfinite().all()):
                return key
    return None


def fetch_torchvision_state(weights: Any) -> dict[str, Tensor]:
    """Return the tensors of a torchvision weights enum member, from torch's cache or the hub.

    Raises:
        SpecError: not in the cache and not reachable, within seconds; a download that stalls, or a
            damaged file.
    """
    url = str(weights.url)
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if not cached.is_file():
        problem = _reach(url)
        if problem is not None:
            raise SpecError(f"cannot reach {url} ({problem}), and it is not in the cache {cached.parent}")
    try:
        with _socket_timeout(_STALL_SECONDS):
            state: dict[str, Tensor] = weights.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, weights_only=True
            )
    except TimeoutError as error:
        raise SpecError(
            f"the download of {url} stalled for {_STALL_SECONDS:g} s: try again, or put the file into "
            f"{cached.parent}"
        ) from error
    except Exception as error:  # download, hash and file format each raise their own
        raise SpecError(
            f"cannot load {cached} ({one_line(error)}): delete it to download it again"
        ) from error
    return state


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Give new sockets a timeout: torch.hub opens its own, without one."""
    earlier = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(earlier)


def _reach(url: str) -> str | None:
    """Return None if the server answers within seconds, or else what is wrong.

    The look-up of a host name cannot be interrupted, so it runs in a thread that may be left behind.
    """
    outcome: list[str | None] = []

    def probe() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
                outcome.append(None)
        except Exception as error:  # whatever it is, the weights cannot be had
            reason = getattr(error, "reason", None)
            outcome.append(one_line(reason if isinstance(reason, OSError) else error))

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return outcome[0] if outcome else f"no answer within {_PROBE_SECONDS:g} s"
