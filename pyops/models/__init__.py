"""Reference models in plain torch.nn, with the standard parameter names."""

from pyops.models.cnn import (
    VGG,
    AlexNet,
    ResNet,
    SmallCNN,
    resnet18,
    resnet50,
    small_cnn,
    vgg11,
    vgg16,
)
from pyops.models.lstm import LSTMClassifier, TextClassifier, lstm128

__all__ = [
    "VGG",
    "AlexNet",
    "LSTMClassifier",
    "ResNet",
    "SmallCNN",
    "TextClassifier",
    "lstm128",
    "resnet18",
    "resnet50",
    "small_cnn",
    "vgg11",
    "vgg16",
]
