"""A dense model from a spec: a torchvision name, ``demo``, or ``package.module:factory``."""

from groupify.zoo.load import build_model, import_attribute, load_model
from groupify.zoo.specs import ModelSpec, Preprocessing, Source, WeightsOrigin
from groupify.zoo.weights import load_checkpoint

__all__ = [
    "ModelSpec",
    "Preprocessing",
    "Source",
    "WeightsOrigin",
    "build_model",
    "import_attribute",
    "load_checkpoint",
    "load_model",
]
