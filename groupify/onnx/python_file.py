"""A Python file that rebuilds a converted model with torch and torchvision alone."""

from __future__ import annotations

import inspect
import os
import pprint
import secrets
from pathlib import Path

from groupify.errors import ArtefactError, SpecError
from groupify.machine import package_version
from groupify.models import demo, torchvision_models
from groupify.onnx import standalone
from groupify.recipe import Recipe

_HEADER = '''\
"""A model with grouped convolutions, written by groupify {version}; torch and torchvision are all it needs.

    from {stem} import load

    model = load("model.safetensors")  # the weights that lie beside the recipe
"""

from __future__ import annotations
'''
_FOOTER = '''\
def build() -> nn.Module:
    """Return the architecture; its weights are still to be loaded."""
    return with_groups(dense(), SITES).eval()


def load(path: str | Path) -> nn.Module:
    """Return the model with the weights of a safetensors file, in eval mode."""
    return fill(build(), read_safetensors(path), CHANNELS_LAST)
'''
_DEMO_IMPORTS = f"""\
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import make_layers

NUM_CLASSES = {demo.NUM_CLASSES}
"""
_DEMO_PARTS = (
    demo.DemoResNet, demo._stage, demo._with_small_stem, demo.demo_model, demo.fashion_resnet18,
    demo.fashion_resnet26, demo.fashion_vgg11_bn,
)  # fmt: skip
_FUTURE = "from __future__ import annotations\n"


def python_file(recipe: Recipe, *, stem: str, trust: bool = False) -> str:
    """Return the text of a Python file with ``build()`` and ``load(path)`` for a recipe's model.

    Args:
        recipe: what to rebuild.
        stem: name of the module that the file will be.
        trust: let the file import the ``package.module:factory`` that the recipe names; such a file needs
            that package too.

    Raises:
        SpecError: the model is code of its own and ``trust`` is off.
        ArtefactError: the recipe's factory is no dotted name of Python, or a shuffle is where none can be.
    """
    library = inspect.getsource(standalone).partition(_FUTURE)[2].strip()
    sites = {
        site.name: (site.structure.reduce, site.groups, site.structure.expand, site.shuffle)
        for site in recipe.sites
    }
    mixed = next((site for site in recipe.sites if site.shuffle and not site.structure.is_one_conv), None)
    if mixed is not None:
        raise ArtefactError(
            f"the recipe's site {mixed.name!r} shuffles what the 1×1 convs of {mixed.structure} mix already"
        )
    preprocessing = recipe.model.preprocessing
    facts = [
        "# (C, H, W) of one input.",
        f"INPUT_SHAPE = {tuple(recipe.model.input_shape)!r}",
        f"CHANNELS_LAST = {recipe.memory_format == 'channels_last'}",
        "# Conv: (channels of a 1×1 conv in front, groups, channels in front of a 1×1 conv behind, shuffle).",
        f"SITES = {pprint.pformat(sites, width=100, sort_dicts=False)}",
    ]
    if preprocessing is not None:
        facts += [
            "# Pixel values in [0, 1] become the input as (x - MEAN) / STD, one value for each channel.",
            f"MEAN, STD = {tuple(preprocessing.mean)!r}, {tuple(preprocessing.std)!r}",
        ]
    header = _HEADER.format(version=package_version("groupify") or "unknown", stem=stem)
    parts = [header, library, "\n".join(facts), _dense(recipe, trust), _FOOTER]
    return "\n\n".join(part.strip("\n") + "\n" for part in parts)


def write_python_file(recipe: Recipe, path: Path, *, trust: bool = False) -> None:
    """Write the file of ``python_file``, whole or not at all.

    Raises:
        SpecError, ArtefactError: as ``python_file``; or the file cannot be written.
    """
    text = python_file(recipe, stem=path.stem, trust=trust)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ArtefactError(
            f"cannot write {path}: {error.strerror}; choose a file in a writable folder"
        ) from error


def _dense(recipe: Recipe, trust: bool) -> str:
    """The code of ``dense()``; whatever comes from the recipe is a Python literal or a checked name."""
    name, arguments = recipe.model.name, dict(recipe.model.arguments)
    if name == "demo" or name.startswith("groupify.models.demo:"):
        call = name.partition(":")[2] or demo.DemoResNet.__name__
        if call not in {part.__name__ for part in _DEMO_PARTS}:
            raise ArtefactError(f"the recipe's model {name!r}: groupify.models.demo has no model {call!r}")
        code = "\n\n".join((_DEMO_IMPORTS, *(inspect.getsource(part) for part in _DEMO_PARTS))) + "\n\n"
    elif ":" in name:
        module, _, call = name.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), *call.split("."))):
            raise ArtefactError(f"the recipe's model {name!r} is no package.module:factory")
        if not trust:
            raise SpecError(
                f"the recipe's model {name!r} is code of its own, which the Python file would import; give "
                f"--trust or --model {name} if you trust it"
            )
        code = f"import {module}  # the dense model is made by code of its own\n\n\n"
        call = f"{module}.{call}"
    else:
        name = torchvision_models.known_name(name)
        arguments = torchvision_models.builder_arguments(name, arguments, initialise=False)
        code = "from torchvision.models import get_model_builder\n\n\n"
        call = f"get_model_builder({name!r})"
    values = pprint.pformat(arguments, width=100, sort_dicts=False)
    return (
        f"{code}def dense() -> nn.Module:\n"
        '    """Return the dense model that the conversion started from, with weights of its own."""\n'
        f"    arguments = {values}\n"
        f"    model: nn.Module = {call}(**arguments)\n"
        "    return model\n"
    )
