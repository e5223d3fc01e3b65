"""AlexNet, as in "One weird trick for parallelizing convolutional neural networks" (2014)."""

import torch
from torch import nn

from pyops.models.checks import check_count, check_images


class AlexNet(nn.Module):
    """AlexNet for (batch, in_channels, height, width) images of at least 63x63 pixels.

    Args:
        num_classes: width of the output, (batch, num_classes).
        in_channels: channels of the images.
        dropout: probability of dropping a feature before each of the two hidden dense layers.

    Raises:
        ValueError: num_classes or in_channels is not positive; forward: the input is too small or
            of another shape.
    """

    smallest_input = 63

    def __init__(self, num_classes: int = 1000, *, in_channels: int = 3, dropout: float = 0.5):
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("in_channels", in_channels)
        self.in_channels = in_channels
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        check_images(x, self.in_channels, self.smallest_input)
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)
