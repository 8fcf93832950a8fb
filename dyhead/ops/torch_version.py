"""The oldest PyTorch that dyhead runs with. setup.py builds for it, and a test compares what pyproject.toml says."""

TORCH_MINIMUM = (2, 11)
