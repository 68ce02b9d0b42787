"""The small network of `scpl demo`: eight 3x3 convolutions for the 8x8 digits."""

from torch import nn

__all__ = ["build_net"]


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def build_net(width: int = 32, num_classes: int = 10) -> nn.Module:
    """(B, 1, 8, 8) float32 images to (B, num_classes) logits."""
    return nn.Sequential(
        _block(1, width),
        _block(width, width),
        _block(width, width),
        _block(width, width),
        nn.MaxPool2d(2),
        _block(width, 2 * width),
        _block(2 * width, 2 * width),
        _block(2 * width, 2 * width),
        _block(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(8 * width, num_classes),
    )
