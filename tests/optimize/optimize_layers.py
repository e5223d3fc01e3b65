"""The layers that the forwards in these tests are written with."""

from torch import nn
from torch.nn import functional as F


class Layers(nn.Module):
    """One of each kind, under the names people give them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)])
        self.relu = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.leaky = nn.LeakyReLU(0.2)
        self.pool = nn.MaxPool2d(2)
        self.average = nn.AvgPool2d(3, stride=2, padding=1)
        self.identity = nn.Identity()
        self.pools = nn.ModuleList([nn.MaxPool2d(2), nn.AvgPool2d(2)])
        self.activation = F.relu
