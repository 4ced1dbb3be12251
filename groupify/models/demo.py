"""The embedded demo (a small ResNet and a subset of Fashion-MNIST) and the benchmark networks.

The demo's assets lie beside this file. ``scripts/make_demo_data.py`` makes the images,
``scripts/train_dense.py`` trains the model, on the training images of Fashion-MNIST that are not embedded:
so what a training on the embedded ones brings is judged by images that the model has not seen.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import make_layers

from groupify.models.preprocessing import Preprocessing

MODEL_FILE = Path(__file__).with_name("demo.safetensors")
DATA_FOLDER = Path(__file__).parents[1] / "data" / "fashion-mnist"
INPUT_SHAPE = (3, 28, 28)
NUM_CLASSES = 10
# Fashion-MNIST, pixel values in [0, 1], the one channel repeated to three.
MEAN = (0.286, 0.286, 0.286)
STD = (0.353, 0.353, 0.353)
PREPROCESSING = Preprocessing(
    size=(28, 28), resize=None, crop="none", mean=MEAN, std=STD, interpolation="bilinear"
)


class DemoResNet(nn.Module):
    """A torchvision-style ResNet for small images: stages of 64, 128 and 256 channels, two blocks each.

    The stem has stride 1, for 28×28 images; the blocks are torchvision's own ``BasicBlock``.
    Input shape (N, 3, H, W), output shape (N, ``num_classes``).
    """

    def __init__(self, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(64, 64, stride=1)
        self.layer2 = _stage(64, 128, stride=2)
        self.layer3 = _stage(128, 256, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(256, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, shape (N, num_classes), of images of shape (N, 3, H, W)."""
        features: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(inputs))))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, *, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or in_channels != channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(channels),
        )
    return nn.Sequential(
        BasicBlock(in_channels, channels, stride, downsample),
        BasicBlock(channels, channels),
    )


def demo_model() -> DemoResNet:
    """Return the demo's architecture with random weights."""
    return DemoResNet()


def fashion_resnet18() -> nn.Module:
    """Return the benchmark network: torchvision's resnet18 with a stride-1 3×3 stem, 10 classes."""
    return _with_small_stem(resnet18(weights=None, num_classes=NUM_CLASSES))


def fashion_resnet26() -> nn.Module:
    """Return torchvision's bottleneck ResNet with two blocks a stage, a stride-1 3×3 stem, 10 classes."""
    return _with_small_stem(ResNet(Bottleneck, [2, 2, 2, 2], num_classes=NUM_CLASSES))


def _with_small_stem(model: nn.Module) -> nn.Module:
    """Give a ResNet the stem for 28×28 images, in place."""
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def fashion_vgg11_bn() -> nn.Module:
    """Return torchvision's VGG-11 with batch norm, sized for 28×28 images and 10 classes.

    The fifth max-pool is left out (four take 28 to 1), and the classifier has 512 hidden units
    rather than 4096. The state-dict keys are those of torchvision.
    """
    channels: list[str | int] = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512]
    features = make_layers(channels, batch_norm=True)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    classifier = nn.Sequential(
        nn.Linear(512, 512),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(512, NUM_CLASSES),
    )
    return nn.Sequential(
        OrderedDict(
            features=features,
            avgpool=nn.AdaptiveAvgPool2d((1, 1)),
            flatten=nn.Flatten(),
            classifier=classifier,
        )
    )
