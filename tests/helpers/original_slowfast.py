"""A small SlowFast by the names of its repository, as a network of somebody's: two pathways and one fusion.

Feichtenhofer et al., "SlowFast Networks" (ICCV 2019): the fast pathway sees every frame, the slow one every fourth,
and the fast one's features are joined to the slow one's by a strided convolution in time.
"""

import torch
from torch import nn

ALPHA, SLOW, FAST = 4, 16, 4


def convolution(inputs, outputs, time=1, side=1, stride=(1, 1, 1)):
    padding = (time // 2, side // 2, side // 2)
    return nn.Conv3d(inputs, outputs, (time, side, side), stride, padding, bias=False)


class Stem(nn.Module):
    def __init__(self, width, time):
        super().__init__()
        self.conv, self.bn = convolution(3, width, time, 7, (1, 2, 2)), nn.BatchNorm3d(width)

    def forward(self, clips):
        return self.bn(self.conv(clips)).relu()


class Branch(nn.Module):
    def __init__(self, inputs, width, outputs):
        super().__init__()
        self.a, self.a_bn = convolution(inputs, width, 3), nn.BatchNorm3d(width)
        self.b, self.b_bn = convolution(width, width, 1, 3), nn.BatchNorm3d(width)
        self.c, self.c_bn = convolution(width, outputs), nn.BatchNorm3d(outputs)

    def forward(self, x):
        x = self.a_bn(self.a(x)).relu()
        return self.c_bn(self.c(self.b_bn(self.b(x)).relu()))


class Block(nn.Module):
    def __init__(self, inputs, width, outputs):
        super().__init__()
        self.branch1, self.branch1_bn = convolution(inputs, outputs), nn.BatchNorm3d(outputs)
        self.branch2 = Branch(inputs, width, outputs)

    def forward(self, x):
        return (self.branch1_bn(self.branch1(x)) + self.branch2(x)).relu()


class Fuse(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_f2s = nn.Conv3d(FAST, 2 * FAST, (5, 1, 1), (ALPHA, 1, 1), (2, 0, 0), bias=False)
        self.bn = nn.BatchNorm3d(2 * FAST)

    def forward(self, slow, fast):
        return torch.cat([slow, self.bn(self.conv_f2s(fast)).relu()], 1)


class SlowFast(nn.Module):
    def __init__(self):
        super().__init__()
        self.s1, self.s1_fuse, self.s2 = nn.Module(), Fuse(), nn.Module()
        self.s1.pathway0_stem, self.s1.pathway1_stem = Stem(SLOW, 1), Stem(FAST, 5)
        self.s2.pathway0_res0 = Block(SLOW + 2 * FAST, SLOW, 4 * SLOW)
        self.s2.pathway1_res0 = Block(FAST, FAST, 4 * FAST)
        self.feature_count = 4 * (SLOW + FAST)

    def forward(self, clips):
        slow, fast = self.s1.pathway0_stem(clips[:, :, ::ALPHA]), self.s1.pathway1_stem(clips)
        slow = self.s1_fuse(slow, fast)
        pathways = self.s2.pathway0_res0(slow), self.s2.pathway1_res0(fast)
        return torch.cat([features.mean((2, 3, 4)) for features in pathways], 1)


def slowfast(*, channels, frames, size_px, heads):
    return SlowFast()


slowfast.mean, slowfast.std = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


def draw_slowfast(seed):
    """A drawn network whose norms do something."""
    torch.manual_seed(seed)
    network = SlowFast().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight, 1, 0.2)
    return network
