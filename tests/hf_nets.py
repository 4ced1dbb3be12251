"""Hugging Face vision models of tiny settings, by their own constructors; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

_STAGES: dict[str, Any] = {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "num_labels": 10}


def resnet(**settings: Any) -> nn.Module:
    """A classifier that compares the number of channels of its input, which no tracer follows."""
    config = transformers.ResNetConfig(**{"embedding_size": 32, "layer_type": "basic", **_STAGES, **settings})
    model: nn.Module = transformers.ResNetForImageClassification(config)
    return model


def segformer() -> nn.Module:
    """A segmentation model whose head reads hidden states that hooks collect."""
    model: nn.Module = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            **{**_STAGES, "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 64, "image_size": 64}
        )
    )
    return model


def vit() -> nn.Module:
    """A transformer."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
    )
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model
