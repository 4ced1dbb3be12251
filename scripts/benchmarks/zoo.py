"""The models that ``scripts.benchmarks.models`` takes through the whole way, and how each is built.

Of timm the smallest model of each family, a family being the letters that its name begins with, and some
that broke an earlier version; of Hugging Face the convolutional vision models in settings of our own, small,
by their constructors, so that nothing is downloaded; of segmentation_models_pytorch, MONAI and
efficientnet_pytorch the architectures. These are no dependencies: a library that is not installed is left
out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchvision.models import get_model_builder, get_model_weights, list_models

SIZES = (32, 64, 96, 128, 160, 224, 256, 384)
_HERE = "scripts.benchmarks.zoo"
_DETECTOR_SIZE = 96
_RESCALING = ("faster_rcnn", "mask_rcnn", "keypoint_rcnn", "retinanet", "fcos")
_FRAMES = 16

TIMM = """
aimv2_large_patch14_224 bat_resnext26ts beit_base_patch16_224 beitv2_base_patch16_224 botnet26t_256
caformer_s18 cait_xxs24_224 coat_tiny coatnet_pico_rw_224 coatnext_nano_rw_224 convformer_s18
convit_tiny convmixer_768_32 convnext_zepto_rms convnextv2_atto cpubone_nano crossvit_tiny_240
cs3darknet_focus_s csatv2 cspdarknet53 cspnext_tiny cspresnet50 cspresnext50 darknet17 darknetaa53
davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 densenetblur121d dla46x_c dm_nfnet_f0
dpn48b eca_botnext26ts_256 eca_resnext26ts ecaresnet26t ecaresnetlight ecaresnext26t_32x4d
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientnetv2_rw_t
efficientvim_m1 efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
fbnetc_100 fbnetv3_b flexivit_small focalnet_tiny_srf gc_efficientnetv2_rw_t gcresnet33ts gcresnext26ts
gcvit_xxtiny gemma4_vit_167m gernet_s ghostnet_050 ghostnetv3_050 gmixer_12_224 gmlp_ti16_224
halo2botnet50ts_256 halonet26t halonet_h1 haloregnetz_b hardcorenas_b hgnet_tiny hgnetv2_b0
hiera_tiny_224 hieradet_small hrnet_w18_small iformer_t inception_next_atto lambda_resnet26t
lamhalobotnet50ts_256 lcnet_035 lcnetv2_small legacy_seresnet18 levit_128s lowformer_b0 mambaout_femto
maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 mixer_s16_224 mixnet_s mnasnet_small
mobilenet_edgetpu_100 mobilenetv3_small_050 mobileone_s0 mobileone_s1 mobilevit_xxs mobilevitv2_050
mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 nfnet_l0
pit_ti_224 pnasnet5large poolformer_s12 poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetv_040
regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvgg_a0 repvit_m0_9 repvit_m1 res2next50
resmlp_12_224 resnest14d resnet10t resnetaa34d resnetblur18 resnetrs50 resnetv2_18 resnext26ts
rexnet_100 rexnetr_100 sam2_hiera_tiny samvit_base_patch16_224 sebotnet33ts_256 sedarknet21
sehalonet33ts selecsls42 semnasnet_050 senet154 sequencer2d_s seresnet18 seresnetaa50d seresnext26ts
seresnextaa201d_32x8d shvit_s1 skresnet18 skresnext50_32x4d spnasnet_100 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 tf_efficientnet_cc_b0_4e tf_mobilenetv3_small_075
tiny_vit_5m_224 tinynet_e tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny
vit_tiny_patch16_dinov3_qkvb vitamin_small_224 volo_d1_224 vovnet39a wide_resnet50_2 xception41
xception41p xcit_nano_12_p8_224
"""  # between spaces

_DEPTHS = {"depths": [1, 1, 1, 1]}
_STAGES: dict[str, Any] = {**_DEPTHS, "hidden_sizes": [32, 32, 64, 64]}
_MIXED: dict[str, Any] = {**_STAGES, "num_attention_heads": [1, 1, 2, 2]}
_RESNET: dict[str, Any] = {
    "model_type": "resnet", "embedding_size": 32, "layer_type": "basic", **_STAGES,
    "out_features": ["stage4"],
}  # fmt: skip
_DETR: dict[str, Any] = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 10,
    "backbone_config": _RESNET, "backbone": None,
    "use_timm_backbone": False,
}  # fmt: skip
_CONVNEXT: dict[str, Any] = {
    "model_type": "convnext", **_STAGES, "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 64,
}  # fmt: skip
HUGGING_FACE: dict[str, dict[str, Any]] = {  # class: settings
    "BitForImageClassification": {"embedding_size": 32, "num_groups": 8, **_STAGES},
    "ConvNextForImageClassification": _STAGES,
    "ConvNextV2ForImageClassification": _STAGES,
    "CvtForImageClassification": {},
    "DINOv3ConvNextModel": _STAGES,
    "EfficientNetForImageClassification": {
        "width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640,
    },
    "FocalNetForImageClassification": {"embed_dim": 32, **_DEPTHS},
    "GLPNForDepthEstimation": {**_MIXED, "decoder_hidden_size": 32},
    "HGNetV2ForImageClassification": {},
    "LevitForImageClassification": {"image_size": 224},
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.5},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.5},
    "MobileNetV2ForSemanticSegmentation": {"depth_multiplier": 0.5},
    "MobileViTForImageClassification": {"image_size": 64},
    "MobileViTForSemanticSegmentation": {"image_size": 64},
    "MobileViTV2ForImageClassification": {"image_size": 64},
    "PoolFormerForImageClassification": _STAGES,
    "PvtForImageClassification": {**_MIXED, "image_size": 64},
    "PvtV2ForImageClassification": {**_MIXED, "image_size": 64},
    "RegNetForImageClassification": {"embedding_size": 32, "groups_width": 16, **_STAGES},
    "ResNetForImageClassification": {"embedding_size": 32, **_STAGES},
    "SegformerForImageClassification": _MIXED,
    "SegformerForSemanticSegmentation": {**_MIXED, "decoder_hidden_size": 64},
    "SwiftFormerForImageClassification": {"embed_dims": [24, 32, 64, 96], **_DEPTHS},
    "TextNetForImageClassification": {},
    "UperNetForSemanticSegmentation": {
        "backbone_config": _CONVNEXT,
        "hidden_size": 64,
        "auxiliary_in_channels": 64,
    },
    "SuperPointForKeypointDetection": {},
    "DetrForObjectDetection": _DETR,
    "DetrForSegmentation": {
        **_DETR, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
        "backbone_config": {**_RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    },
    "ConditionalDetrForObjectDetection": _DETR,
    "TableTransformerForObjectDetection": _DETR,
    "DeformableDetrForObjectDetection": {**_DETR, "num_feature_levels": 1, "decoder_layers": 2},
    "RTDetrForObjectDetection": {},
    "RTDetrV2ForObjectDetection": {},
    "DFineForObjectDetection": {},
    "Swin2SRForImageSuperResolution": {
        "embed_dim": 32,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "image_size": 64,
    },
    "PPLCNetForImageClassification": {},
    "PPOCRV5MobileDetForObjectDetection": {},
    "DepthAnythingForDepthEstimation": {},
    "DPTForDepthEstimation": {
        **_TRANSFORMER, "fusion_hidden_size": 32, "neck_hidden_sizes": [16, 32, 48, 64],
        "backbone_out_indices": [0, 1, 2, 3],
    },
    "Data2VecVisionForSemanticSegmentation": {**_TRANSFORMER, "num_hidden_layers": 12},
    "BeitForSemanticSegmentation": {
        **_TRANSFORMER, "num_hidden_layers": 12, "out_indices": [3, 5, 7, 11],
    },
    "MaskFormerForInstanceSegmentation": {},
    "Mask2FormerForUniversalSegmentation": {},
    "TimmWrapperForImageClassification": {"architecture": "resnet18"},
}  # fmt: skip

_SMP_ENCODER: dict[str, Any] = {"encoder_name": "resnet18", "encoder_weights": None}
_SMP_NETS = """
Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer
"""  # between spaces
_SMP_ENCODERS = """
efficientnet-b0 mobilenet_v2 densenet121 vgg11_bn se_resnet50 timm-regnetx_002 mobileone_s0 mit_b0
timm-efficientnet-b0 dpn68 inceptionv4 xception tu-convnext_atto
"""  # between spaces
_TWO_D: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_THREE_D: dict[str, Any] = {**_TWO_D, "spatial_dims": 3}
_UNET: dict[str, Any] = {"channels": [16, 32, 64], "strides": [2, 2]}
_FLAT, _CUBE = (1, 64, 64), (1, 32, 32, 32)
OTHERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {  # name: (factory, settings, shape)
    **{
        f"smp {name}": (f"segmentation_models_pytorch:{name}", _SMP_ENCODER, (3, 128, 128))
        for name in _SMP_NETS.split()
    },
    **{
        f"smp Unet, {name}": (
            "segmentation_models_pytorch:Unet", {**_SMP_ENCODER, "encoder_name": name}, (3, 64, 64)
        )
        for name in _SMP_ENCODERS.split()
    },
    "monai UNet": ("monai.networks.nets:UNet", {**_TWO_D, **_UNET, "num_res_units": 2}, _FLAT),
    "monai UNet, 3d": ("monai.networks.nets:UNet", {**_THREE_D, **_UNET, "num_res_units": 2}, _CUBE),
    "monai BasicUNet": ("monai.networks.nets:BasicUNet", _TWO_D, _FLAT),
    "monai BasicUNet, 3d": ("monai.networks.nets:BasicUNet", _THREE_D, _CUBE),
    "monai BasicUNetPlusPlus": ("monai.networks.nets:BasicUNetPlusPlus", _TWO_D, _FLAT),
    "monai AttentionUnet": ("monai.networks.nets:AttentionUnet", {**_TWO_D, **_UNET}, _FLAT),
    "monai DynUNet": (
        "monai.networks.nets:DynUNet",
        {**_TWO_D, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}, _FLAT,
    ),
    "monai SegResNet": ("monai.networks.nets:SegResNet", {**_TWO_D, "init_filters": 16}, _FLAT),
    "monai SegResNet, 3d": ("monai.networks.nets:SegResNet", {**_THREE_D, "init_filters": 16}, _CUBE),
    "monai VNet": ("monai.networks.nets:VNet", _TWO_D, _FLAT),
    "monai HighResNet": ("monai.networks.nets:HighResNet", _TWO_D, _FLAT),
    "monai DenseNet121": ("monai.networks.nets:DenseNet121", _TWO_D, _FLAT),
    "monai EfficientNetBN": (
        "monai.networks.nets:EfficientNetBN",
        {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 2, "in_channels": 1}, _FLAT,
    ),
    "monai resnet18, 3d": (
        "monai.networks.nets:resnet18", {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 2}, _CUBE
    ),
    "monai SEResNet50": (
        "monai.networks.nets:SEResNet50", {"spatial_dims": 2, "in_channels": 1, "num_classes": 2}, _FLAT
    ),
    "monai FlexibleUNet": (
        "monai.networks.nets:FlexibleUNet",
        {"in_channels": 1, "out_channels": 2, "backbone": "resnet18", "spatial_dims": 2}, _FLAT,
    ),
    "monai UNETR": (
        "monai.networks.nets:UNETR",
        {
            "in_channels": 1, "out_channels": 2, "img_size": 64, "spatial_dims": 2, "hidden_size": 48,
            "mlp_dim": 64, "num_heads": 4,
        }, _FLAT,
    ),
    "monai SwinUNETR": (
        "monai.networks.nets:SwinUNETR",
        {"in_channels": 1, "out_channels": 2, "spatial_dims": 2, "feature_size": 24}, _FLAT,
    ),
    "monai AutoEncoder": (
        "monai.networks.nets:AutoEncoder", {**_TWO_D, **_UNET, "strides": [2, 2, 2]}, _FLAT
    ),
    "monai MedNeXt": ("monai.networks.nets:MedNeXt", {**_TWO_D, "init_filters": 16}, _FLAT),
    "monai RegUNet": (
        "monai.networks.nets:RegUNet",
        {"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 16, "depth": 2}, _FLAT,
    ),
    "monai Discriminator": (
        "monai.networks.nets:Discriminator", {"in_shape": _FLAT, **_UNET}, _FLAT
    ),
    "monai QuickNAT": (
        "monai.networks.nets:Quicknat", {"num_classes": 2, "num_channels": 1, "num_filters": 32}, _FLAT
    ),
    **{
        f"efficientnet_pytorch {name}": (
            "efficientnet_pytorch:EfficientNet.from_name", {"model_name": f"efficientnet-{name}"}, (3, 64, 64)
        )
        for name in ("b0", "b1")
    },
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One model of a library.

    Attributes:
        name: in the table.
        kind: what its library files it under.
        factory: a name that ``groupify.load_model`` takes.
        arguments: for the factory; JSON values.
        shapes: of one input, (C, H, W) or (C, T, H, W): the first one that works is taken.
        backbone: whether only the backbone is exported, since the head picks boxes by their scores, which no
            graph of fixed structure does.
        refusal: why the model is not tried at all.
    """

    name: str
    kind: str
    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = tuple((3, size, size) for size in SIZES)
    backbone: bool = False
    refusal: str | None = None


def entries(library: str) -> dict[str, Entry]:
    """Return the models of one of ``LIBRARIES``, by name; none where it is not installed."""
    return {entry.name: entry for entry in LIBRARIES[library]()}


def _torchvision() -> Iterable[Entry]:
    return map(_torchvision_entry, sorted(list_models(), key=_parameters))


def _parameters(name: str) -> int:
    return int(get_model_weights(name).DEFAULT.meta["num_params"])


def _torchvision_entry(name: str) -> Entry:
    module = get_model_builder(name).__module__.removeprefix("torchvision.models.").split(".")
    kind = module[0] if len(module) > 1 else "classification"
    arguments = {"min_size": _DETECTOR_SIZE, "max_size": _DETECTOR_SIZE} if module[-1] in _RESCALING else {}
    frames = (_FRAMES,) if kind == "video" else ()
    refusal = "takes two images, and the sweep gives one" if kind == "optical_flow" else None
    shapes = tuple((3, *frames, size, size) for size in SIZES)
    return Entry(name, kind, name, arguments, shapes, kind == "detection", refusal)


def _timm() -> Iterable[Entry]:
    if importlib.util.find_spec("timm") is None:
        return
    import timm

    for name in TIMM.split():
        settings = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
        channels, side = (settings.input_size[0], settings.input_size[-1]) if settings else (3, 224)
        sides = [size for size in SIZES if size < side] if settings and not settings.fixed_input_size else []
        shapes = tuple((channels, size, size) for size in [*sides, side])
        entry = timm.models.model_entrypoint(name)
        kind = entry.__module__.removeprefix("timm.models.")
        yield Entry(name, kind, "timm:create_model", {"model_name": name, "pretrained": False}, shapes)


def _hugging_face() -> Iterable[Entry]:
    if importlib.util.find_spec("transformers") is None:
        return
    for name, settings in HUGGING_FACE.items():
        shapes = tuple((3, size, size) for size in (64, 128, 224, 256, 384, 512))
        if side := settings.get("image_size"):
            shapes = ((3, side, side),)
        kind = name.partition("For")[2] or "features"
        yield Entry(name, kind, f"{_HERE}:hugging_face", {"name": name}, shapes)


def hugging_face(name: str) -> nn.Module:
    """Build a model of Hugging Face, by the settings above."""
    import transformers

    kind = getattr(transformers, name)
    model: nn.Module = kind(kind.config_class(**HUGGING_FACE[name]))
    return model


def _others() -> Iterable[Entry]:
    for name, (factory, arguments, shape) in OTHERS.items():
        package = factory.partition(":")[0].partition(".")[0]
        if importlib.util.find_spec(package):
            yield Entry(name, package, factory, arguments, (shape,))


LIBRARIES: dict[str, Callable[[], Iterable[Entry]]] = {
    "torchvision": _torchvision, "timm": _timm, "huggingface": _hugging_face, "others": _others,
}  # fmt: skip
