"""Dynamic Head (Dai et al., CVPR 2021) for any feature-pyramid detector: operator, modules and detectors."""

__version__ = "0.1.0"
