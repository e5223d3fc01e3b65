"""VGG without batch normalisation: Simonyan and Zisserman, arXiv:1409.1556, columns A and D."""

from collections.abc import Sequence

import torch
from torch import nn

from pyops.models.checks import check_count, check_images

# Output channels of the 3x3 convolutions of each stage; a 2x2 max pool ends every stage.
VGG11_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))
VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """VGG for (batch, in_channels, height, width) images of at least 32x32 pixels.

    Args:
        stages: output channels of the convolutions of each stage.
        num_classes: width of the output, (batch, num_classes).
        in_channels: channels of the images.
        dropout: probability of dropping a feature after each of the two hidden dense layers.

    Raises:
        ValueError: num_classes or in_channels is not positive; forward: the input is too small or
            of another shape.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        dropout: float = 0.5,
    ):
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        self.in_channels = in_channels
        self.smallest_input = 2 ** len(stages)
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in stages:
            for out_channels in stage:
                layers += [
                    nn.Conv2d(channels, out_channels, kernel_size=3, padding=1),
                    nn.ReLU(inplace=True),
                ]
                channels = out_channels
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        self._initialise()

    def _initialise(self) -> None:
        """Weights whose scale survives eleven and more layers without normalisation."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, self.in_channels, self.smallest_input)
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def vgg11(num_classes: int = 1000, *, in_channels: int = 3, dropout: float = 0.5) -> VGG:
    """VGG-11: eight convolutions, three dense layers. Arguments as for `VGG`."""
    return VGG(VGG11_STAGES, num_classes, in_channels=in_channels, dropout=dropout)


def vgg16(num_classes: int = 1000, *, in_channels: int = 3, dropout: float = 0.5) -> VGG:
    """VGG-16: thirteen convolutions, three dense layers. Arguments as for `VGG`."""
    return VGG(VGG16_STAGES, num_classes, in_channels=in_channels, dropout=dropout)
