"""Random arguments of the channel-wise operators."""

import torch


def make_maps(count=2, *, batch=2, channels=5, size=(4, 7), dtype=torch.float64, last=True, seed=0):
    torch.manual_seed(seed)
    layout = torch.channels_last if last else torch.contiguous_format
    xs = [torch.randn(batch, channels, *size).to(dtype).contiguous(memory_format=layout) for _ in range(count)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slopes, intercepts = torch.randn(batch, 2, count, channels), torch.randn(batch, 2, channels)
    return [x.requires_grad_() for x in xs], slopes.to(wide).requires_grad_(), intercepts.to(wide).requires_grad_()


# Beyond one chunk of pixels and one block of channels, and neither whole.
MAP_SHAPES = [
    {},
    {"last": False},
    {"count": 1, "channels": 130, "size": (20, 33)},
    {"count": 3, "channels": 1, "size": (1, 600)},
    {"batch": 1, "channels": 64, "size": (1, 1)},
    {"batch": 0},
]
