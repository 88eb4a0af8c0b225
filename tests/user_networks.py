"""Networks as users bring them: plain torch, none of it ours."""

import torch
from torch import nn
from torch.nn import functional as F


class MeanShift(nn.Module):
    """A constant added to the colors, as the released CARN has it: a 1x1 convolution."""

    def __init__(self, mean, sign):
        super().__init__()
        self.shifter = nn.Conv2d(3, 3, 1)
        self.shifter.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.shifter.bias.data = torch.tensor([sign * m for m in mean])

    def forward(self, x):
        return self.shifter(x)


class CarnBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, groups=groups),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, groups=groups),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x):
        return F.relu(self.body(x) + x)


class CarnFusion(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c_in, c_out, 1), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.body(x)


class CarnCascade(nn.Module):
    """One block used three times."""

    def __init__(self, channels, groups):
        super().__init__()
        self.b1 = CarnBlock(channels, groups)
        self.c1 = CarnFusion(2 * channels, channels)
        self.c2 = CarnFusion(3 * channels, channels)
        self.c3 = CarnFusion(4 * channels, channels)

    def forward(self, x):
        planes, out = x, x
        for fusion in (self.c1, self.c2, self.c3):
            planes = torch.cat([planes, self.b1(out)], dim=1)
            out = fusion(planes)
        return out


class CarnUpsampler(nn.Module):
    def __init__(self, channels, scale, groups):
        super().__init__()
        layers = []
        for factor in [2, 2] if scale == 4 else [scale]:
            layers += [
                nn.Conv2d(channels, channels * factor**2, 3, 1, 1, groups=groups),
                nn.ReLU(inplace=True),
            ]
            layers += [nn.PixelShuffle(factor)]
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return self.body(x)


class CarnUpsamplers(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        for scale in (2, 3, 4):
            self.add_module(f"up{scale}", CarnUpsampler(channels, scale, groups))

    def forward(self, x, scale):
        return getattr(self, f"up{scale}")(x)


class CarnM(nn.Module):
    """CARN-M for all scales, with the layer names of its released weights: recursion, groups, cascades."""

    def __init__(self, channels=64, groups=4):
        super().__init__()
        mean = (0.4488, 0.4371, 0.4040)
        self.sub_mean = MeanShift(mean, -1)
        self.add_mean = MeanShift(mean, 1)
        self.entry = nn.Conv2d(3, channels, 3, 1, 1)
        for i in (1, 2, 3):
            self.add_module(f"b{i}", CarnCascade(channels, groups))
            self.add_module(f"c{i}", CarnFusion((i + 1) * channels, channels))
        self.upsample = CarnUpsamplers(channels, groups)
        self.exit = nn.Conv2d(channels, 3, 3, 1, 1)

    def forward(self, x, scale):
        out = self.entry(self.sub_mean(x))
        planes = out
        for i in (1, 2, 3):
            planes = torch.cat([planes, getattr(self, f"b{i}")(out)], dim=1)
            out = getattr(self, f"c{i}")(planes)
        return self.add_mean(self.exit(self.upsample(out, scale)))


class Resnet(nn.Module):
    """Residual blocks with batch norm and PReLU, a long skip, 0 to 255 and a scaled mean."""

    def __init__(self, channels=16, n_blocks=2, scale=2, peak=255.0):
        super().__init__()
        self.peak = peak
        self.register_buffer("mean", torch.tensor([0.45, 0.44, 0.40]).view(1, 3, 1, 1) * peak)
        self.head = nn.Sequential(nn.Conv2d(3, channels, 9, padding=4), nn.PReLU())
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.PReLU(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(channels),
            )
            for _ in range(n_blocks)
        )
        self.end = nn.Conv2d(channels, channels, 3, padding="same")
        self.tail = nn.Sequential(
            nn.Conv2d(channels, channels * scale**2, 3, padding=1), nn.PixelShuffle(scale), nn.PReLU()
        )
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x):
        x = (x - self.mean) / self.peak
        skip = y = self.head(x)
        for block in self.body:
            y = y + 0.5 * block(y)
        y = self.last(self.tail(self.end(y) + skip))
        return torch.clamp(y * self.peak + self.mean, 0, self.peak)


class Dense(nn.Module):
    def __init__(self, channels, growth):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels + i * growth, channels if i == 2 else growth, 3, 1, 1) for i in range(3)
        )
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x):
        parts = [x]
        for conv in self.convs[:-1]:
            parts.append(self.act(conv(torch.cat(parts, 1))))
        return self.convs[-1](torch.cat(parts, 1)) * 0.2 + x


class Rrdb(nn.Module):
    """Dense blocks within residual blocks, nearest-neighbor upsampling: the form of ESRGAN."""

    def __init__(self, channels=16, growth=8):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, 1, 1)
        self.body = nn.Sequential(
            *(nn.Sequential(Dense(channels, growth), Dense(channels, growth)) for _ in range(2))
        )
        self.trunk = nn.Conv2d(channels, channels, 3, 1, 1)
        self.up1 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.up2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.last = nn.Conv2d(channels, 3, 3, 1, 1)

    def forward(self, x):
        features = self.first(x)
        y = features
        for block in self.body:
            y = block(y) * 0.2 + y
        features = features + self.trunk(y)
        for conv in (self.up1, self.up2):
            features = F.leaky_relu(conv(F.interpolate(features, scale_factor=2, mode="nearest")), 0.2)
        return self.last(features)


class Distillation(nn.Module):
    """Part of the channels goes on, the rest is kept: split, cat and sum in one block; a deconvolution at the end."""

    def __init__(self, channels=16):
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, 1, 1)
        self.a = nn.Conv2d(channels, channels, 3, 1, 1)
        self.b = nn.Conv2d(channels - 4, channels + 4, 3, 1, 1)
        self.compress = nn.Conv2d(channels + 4, channels, 1)
        self.up = nn.ConvTranspose2d(channels, 3, 9, stride=3, padding=4, output_padding=2)

    def forward(self, x):
        y = self.head(x)
        h = F.leaky_relu(self.a(y), 0.05)
        kept, rest = torch.split(h, [4, h.shape[1] - 4], dim=1)
        h = self.b(rest) + torch.cat((y, kept), 1)
        y = self.up(F.leaky_relu(self.compress(h), 0.05))
        return y + F.interpolate(x, scale_factor=3, mode="bicubic", align_corners=False)


class Compact(nn.Module):
    """A plain chain with PReLU and the enlarged picture added: no residual blocks."""

    def __init__(self, channels=16, n_convs=3, scale=4):
        super().__init__()
        self.scale = scale
        self.body = nn.ModuleList([nn.Conv2d(3, channels, 3, 1, 1), nn.PReLU(channels)])
        for _ in range(n_convs):
            self.body += [nn.Conv2d(channels, channels, 3, 1, 1), nn.PReLU(channels)]
        self.body.append(nn.Conv2d(channels, 3 * scale**2, 3, 1, 1))
        self.upsampler = nn.PixelShuffle(scale)

    def forward(self, x):
        out = x
        for layer in self.body:
            out = layer(out)
        out = self.upsampler(out)
        out += F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return out


class Attention(nn.Module):
    """Has a product of features, which is refused."""

    def __init__(self, channels=8):
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, 1, 1)
        self.gate = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Sigmoid())
        self.tail = nn.Sequential(nn.Conv2d(channels, 12, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, x):
        y = self.head(x)
        return self.tail(y * self.gate(y))
