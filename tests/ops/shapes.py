"""Shapes that are unkind to a kernel, as options of `make_case`."""

SHAPES = [
    {"channels": 1, "out_channels": 1, "size": (1, 1), "levels": ((1, 1),)},
    {"channels": 3, "out_channels": 17, "size": (7, 11), "levels": ((14, 22), (7, 11), (4, 6), (2, 3))},
    {"channels": 37, "out_channels": 65, "size": (7, 11), "levels": ((13, 21),), "mask": False},
    {"channels": 130, "out_channels": 7, "size": (2, 3), "levels": ((2, 3), (1, 2)), "bias": False},
    {
        "channels": 66,
        "out_channels": 34,
        "groups": 2,
        "size": (4, 5),
        "levels": ((8, 10), (4, 5)),
        "level_weight": False,
    },
    {"channels": 24, "out_channels": 8, "groups": 4, "offset_groups": 3, "size": (3, 50), "levels": ((3, 50),)},
    {"channels": 12, "out_channels": 12, "groups": 12, "offset_groups": 2, "size": (5, 4), "levels": ((10, 8),)},
    {"channels": 150, "out_channels": 3, "offset_groups": 1, "size": (11, 19), "levels": ((6, 10),), "batch": 3},
    # More taps than a vector has lanes, and whole vectors of channels that leave a rest.
    {"channels": 33, "out_channels": 35, "kernel": (5, 4), "size": (4, 5), "levels": ((4, 5),)},
    {"kernel": (2, 5), "dilation": (3, 1), "size": (6, 6), "levels": ((12, 12), (3, 3)), "scales": [1.7, 0.61]},
    {"batch": 0},
]

# What else the CUDA kernels tell apart: whole vectors of channels, wide blocks of output or input channels, groups that
# whole vectors share, more pixels than a patch, taps without slices to spare.
CUDA_SHAPES = [
    {"channels": 72, "out_channels": 264, "size": (17, 19), "levels": ((17, 19), (9, 10))},
    {
        "channels": 64,
        "out_channels": 64,
        "groups": 2,
        "offset_groups": 4,
        "size": (9, 17),
        "levels": ((18, 34), (9, 17)),
    },
    {"channels": 136, "out_channels": 24, "size": (5, 6), "levels": ((5, 6),)},
    {"channels": 16, "out_channels": 16, "kernel": (1, 1), "size": (3, 3), "levels": ((3, 3),)},
]
