"""The artefact: a folder with ``recipe.json`` and ``model.safetensors``, saved and loaded.

Nothing that is read here can run code: JSON against a strict schema, safetensors, and no import
that the caller has not asked for. Whatever is wrong with a folder is one ``GroupifyError``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from groupify.conversion.surgery import restructure
from groupify.conversion.working_copy import make_persistent
from groupify.errors import ArtefactError, CheckpointError, GroupifyError, GroupifyWarning, expect_type
from groupify.files import MAX_RECIPE_BYTES, RECIPE_FILE, folder_exists, writing_folder
from groupify.graph.hooks import is_foreign
from groupify.models.sources import build_model
from groupify.models.specs import ModelSpec
from groupify.models.wrappers import unwrapped
from groupify.recipe import Recipe
from groupify.structures import SiteRecipe

__all__ = ["Recipe", "SiteRecipe", "apply", "load", "read_recipe", "save", "write_artefact", "writing_folder"]

WEIGHTS_FILE = "model.safetensors"
# What a recipe may ask of a model constructor without --trust: enough for torchvision's own options,
# too little to make it build for hours or fill the memory.
MAX_ARGUMENT = 65_536
MAX_ARGUMENT_LIST = 16
# groupify's own code; whole names, since "groupify.models.demo:nn..." would lead anywhere.
_OWN_FACTORIES = ("groupify.models.demo:fashion_resnet18", "groupify.models.demo:fashion_vgg11_bn")
_HEADER_BYTES = 2**20


def save(folder: str | Path, model: nn.Module, recipe: Recipe, *, force: bool = False) -> Recipe:
    """Write an artefact folder, whole or not at all.

    Args:
        folder: the folder to write.
        model: the converted model.
        recipe: what describes it; its ``sha256``, ``memory_format`` and ``hooked`` are filled in.
        force: replace an existing artefact folder.

    Returns:
        The recipe as written.

    Raises:
        ArtefactError: the folder exists or cannot be written, or the recipe does not describe ``model``.
    """
    with writing_folder(folder, force) as temporary:
        return write_artefact(temporary, model, recipe)


def write_artefact(folder: Path, model: nn.Module, recipe: Recipe) -> Recipe:
    """Write ``recipe.json`` and ``model.safetensors`` into an existing folder; see ``save``."""
    model = unwrapped(model)
    state = _tensors(model)
    if ":" not in recipe.model.name:
        with torch.random.fork_rng(devices=[]):
            _check_state(_skeleton(recipe, trust=True), state, "the recipe does not describe this model")
    content = safetensors.torch.save(_unshared(state), metadata={"format": "pt"})
    recipe = dataclasses.replace(
        recipe,
        memory_format=_memory_format(state),
        hooked=_hooked(model),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    text = recipe.dumps().encode()
    if len(text) > MAX_RECIPE_BYTES:
        raise ArtefactError(f"the recipe takes {len(text)} bytes, at most {MAX_RECIPE_BYTES} are allowed")
    for name, data in ((WEIGHTS_FILE, content), (RECIPE_FILE, text)):
        _write_file(folder / name, data)
    return recipe


def read_recipe(folder: str | Path) -> Recipe:
    """Return the recipe of an artefact folder.

    Raises:
        ArtefactError: there is no such folder or recipe, or the recipe breaks the schema.
    """
    path = Path(folder) / RECIPE_FILE
    folder_exists(folder)
    recipe = _recipe_of(path)
    if recipe.sha256 is None:
        raise ArtefactError(f"{path}: recipe.sha256 is None; expected 64 hexadecimal digits")
    return recipe


def _recipe_of(path: Path) -> Recipe:
    try:
        return Recipe.loads(_read_file(path, MAX_RECIPE_BYTES).decode())
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{path}: it is not UTF-8 text: {error}") from error
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}") from error


def load(folder: str | Path, *, model: nn.Module | None = None, trust: bool = False) -> nn.Module:
    """Return the converted model of an artefact folder, in eval mode.

    Its outputs equal those of the saved model bit for bit, on the same kind of machine.

    Args:
        folder: an artefact folder.
        model: a dense model of the recipe's architecture to build on, instead of the recipe's own
            model spec; a copy of it is converted, on its device, and it is left untouched.
        trust: let the recipe import and call its ``package.module:factory``, or pass any arguments
            to a model constructor. Without it, a recipe runs no code but groupify's and torchvision's.

    Raises:
        ArtefactError: the folder or the recipe cannot be used.
        CheckpointError: the weights are missing, corrupt, or belong to another model.
        ConversionError: ``model`` does not have the recipe's convs.
        SpecError: the recipe's model cannot be built.

    Warns:
        GroupifyWarning: the saved model had forward hooks that this one has not.
    """
    expect_type(folder, (str, Path), "folder", "a folder that groupify wrote, as a text or a Path")
    recipe = read_recipe(folder)
    path = Path(folder) / WEIGHTS_FILE
    if model is not None and any(parameter.is_meta for parameter in model.parameters()):
        raise ArtefactError("the given model is on the meta device: give one with values")
    with torch.random.fork_rng(devices=[]):
        converted = _skeleton(recipe, trust=trust) if model is None else _converted(model, recipe)
        state = _read_weights(path, recipe, converted)
        make_persistent(converted, state)
        _check_state(converted, state, str(path))
        if any(tensor.is_meta for tensor in converted.state_dict().values()):
            converted = _converted(_dense(recipe.model, trust=trust), recipe)
            make_persistent(converted, state)
    _fill(converted, state, path)
    if recipe.memory_format == "channels_last":
        converted = converted.to(memory_format=torch.channels_last)
    _warn_of_lost_hooks(converted, recipe)
    return converted.eval()


def apply(recipe: Recipe | str | Path, model: nn.Module) -> nn.Module:
    """Rebuild a converted architecture in code of one's own: a copy of a dense model with the recipe's convs.

    The weights of the new convs are what truncation leaves of the dense ones, until those of a checkpoint of
    the converted model are loaded, by whatever wrote it: a training loop of one's own, Lightning.

    Args:
        recipe: a recipe, its file, or the folder that holds it.
        model: a dense model of the recipe's architecture; it is left untouched.

    Returns:
        The copy, each module in the training mode that it had.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3))
        >>> result = groupify.compress(net, torch.randn(64, 16, 8, 8), groups=2)
        >>> again = groupify.apply(result.recipe, net)
        >>> again.load_state_dict(result.model.state_dict())
        <All keys matched successfully>

    Raises:
        WrongTypeError: ``recipe`` is something else.
        ArtefactError: there is no such recipe, or it breaks the schema.
        ConversionError: ``model`` does not have the recipe's convs.
    """
    if isinstance(recipe, str | Path):
        path = Path(recipe)
        if not path.is_dir():
            return _converted(model, _recipe_of(path))
        recipe = read_recipe(path)
        converted = _converted(model, recipe)
        # Values that the conversion made part of the state are part of every checkpoint.
        make_persistent(converted, _read_weights(path / WEIGHTS_FILE, recipe, converted))
        return converted
    expect_type(recipe, Recipe, "recipe", "a Recipe, a folder that groupify wrote, or its recipe.json")
    return _converted(model, recipe)


def _hooked(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules whose outputs may depend on what no state dict holds; "." is the model itself."""
    found = []
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if "forward" in vars(module) or any(is_foreign(hook) for hook in hooks):
            found.append(name or ".")
    return tuple(found)


def _warn_of_lost_hooks(model: nn.Module, recipe: Recipe) -> None:
    lost = sorted(set(recipe.hooked) - set(_hooked(model)))
    if lost:
        warnings.warn(
            f"the saved model had hooks, or a forward of its own, on {', '.join(map(repr, lost[:3]))}, which "
            "are not saved: outputs may differ; load(folder, model=…) takes a dense model that has them",
            GroupifyWarning,
            stacklevel=3,
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ArtefactError(
                f"the model keeps a {type(value).__name__} under {key!r} in its state; expected tensors: "
                "an artefact holds no pickled objects"
            )
        if value.is_meta:
            raise ArtefactError(f"{key!r} is on the meta device and has no values: load the weights first")
    return state


def _memory_format(state: Mapping[str, Tensor]) -> str:
    spatial = [value for value in state.values() if value.dim() == 4 and not value.is_contiguous()]
    if any(value.is_contiguous(memory_format=torch.channels_last) for value in spatial):
        return "channels_last"
    return "contiguous"


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors that share no memory, as safetensors wants them."""
    return {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in state.items()
    }


def _dense(spec: ModelSpec, *, trust: bool) -> nn.Module:
    """Build the dense architecture; whatever a constructor raises is a refusal of the recipe."""
    if not trust:
        _check_arguments(spec)
    try:
        return build_model(spec, trust=trust or spec.name in _OWN_FACTORIES)
    except GroupifyError:
        raise
    except Exception as error:
        raise ArtefactError(f"the model {spec.name!r} cannot be built: {_one_line(error)}") from error


def _check_arguments(spec: ModelSpec) -> None:
    for key, value in spec.arguments.items():
        values = value if isinstance(value, list) else [value]
        weights = key.startswith("weights") and value is not None
        plain = all(entry is None or isinstance(entry, (bool, int, float, str)) for entry in values)
        small = all(not isinstance(entry, (int, float)) or abs(entry) <= MAX_ARGUMENT for entry in values)
        if weights or not plain or not small or len(values) > MAX_ARGUMENT_LIST:
            raise ArtefactError(
                f"the recipe passes {key}={str(value)[:60]!r} to the model {spec.name!r}; a recipe without "
                f"trust passes texts, booleans and numbers up to {MAX_ARGUMENT}, and no weights: "
                "use --trust (trust=True) if you know where it comes from"
            )


def _converted(dense: nn.Module, recipe: Recipe) -> nn.Module:
    try:
        return restructure(dense, recipe.sites)
    except GroupifyError:
        raise
    except Exception as error:
        raise ArtefactError(f"the model cannot be copied and converted: {_one_line(error)}") from error


def _skeleton(recipe: Recipe, *, trust: bool = False) -> nn.Module:
    """Build the converted architecture without memory where possible, to compare it with the weight file.

    A few constructors (torchvision's RegNet) compute with tensors and need real ones.
    """
    try:
        with torch.device("meta"):
            dense = _dense(recipe.model, trust=trust)
    except GroupifyError:
        # If the missing memory is not the reason, the same error comes again.
        dense = _dense(recipe.model, trust=trust)
    return _converted(dense, recipe)


def _read_weights(path: Path, recipe: Recipe, expected: nn.Module) -> dict[str, Tensor]:
    """Read, verify and parse the weight file; at most as much of it as ``expected`` can need."""
    state = expected.state_dict()
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    limit = _HEADER_BYTES + sum(8 * value.numel() for value in tensors) + sum(len(key) + 512 for key in state)
    try:
        content = _read_file(path, limit)
    except ArtefactError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if hashlib.sha256(content).hexdigest() != recipe.sha256:
        raise CheckpointError(
            f"{path}: its SHA-256 is not the one in {RECIPE_FILE}: it is damaged or from another artefact: "
            "copy the folder again"
        )
    try:
        return safetensors.torch.load(content)
    except Exception as error:
        raise CheckpointError(f"{path}: it is not a safetensors file: {_one_line(error)}") from error


def _check_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Compare keys, shapes and kinds of numbers; the first mismatch is named.

    Raises:
        CheckpointError: ``state`` does not fill ``model`` exactly.
    """
    expected: dict[str, Any] = model.state_dict()
    for key, tensor in expected.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{where}: {key!r} is no tensor in this model, and cannot be loaded")
        if key not in state:
            raise CheckpointError(f"{where}: {key!r} of shape {tuple(tensor.shape)} is missing")
        found = state[key]
        if found.shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {key!r} has shape {tuple(found.shape)}, the model has {tuple(tensor.shape)}"
            )
        if found.dtype != tensor.dtype and not (found.is_floating_point() and tensor.is_floating_point()):
            raise CheckpointError(f"{where}: {key!r} holds {found.dtype}, the model has {tensor.dtype}")
    for key, tensor in state.items():
        if key not in expected:
            raise CheckpointError(
                f"{where}: the model has no {key!r} (shape {tuple(tensor.shape)} in the file)"
            )


def _fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``state`` into ``model``, which takes the dtypes of ``state``."""
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    try:
        if len(dtypes) == 1:
            model.to(dtypes.pop())
        target = model.state_dict(keep_vars=True)
        for key, tensor in target.items():
            if tensor.dtype != state[key].dtype:
                tensor.data = tensor.data.to(state[key].dtype)
        filled = OrderedDict(state)
        # Some modules (torchvision's MNASNet) refuse a state without their own version number.
        filled._metadata = getattr(target, "_metadata", None)  # type: ignore[attr-defined]
        model.load_state_dict(filled, strict=True)
    except Exception as error:
        raise CheckpointError(f"{path}: its weights do not go into the model: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _read_file(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most ``limit`` bytes; no symlink, pipe or device."""
    # O_NONBLOCK: opening a pipe must not wait for a writer.
    flags = (
        os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    if not path.parent.is_dir():
        raise ArtefactError(f"there is no folder {str(path.parent)!r}; expected one that groupify wrote")
    if path.is_symlink():
        raise ArtefactError("it is a symbolic link; expected a regular file: copy the file itself there")
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtefactError("it is not a regular file")
            if status.st_size > limit:
                raise ArtefactError(f"it has {status.st_size} bytes, expected at most {limit}")
            return file.read(limit)
    except FileNotFoundError as error:
        raise ArtefactError("there is no such file; expected a folder that groupify wrote") from error
    except (OSError, ValueError) as error:
        raise ArtefactError(f"it cannot be read: {error}") from error


def _write_file(path: Path, content: bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ArtefactError(f"cannot write {path.name}: {error.strerror}; free some space") from error
