"""Trained detectors on pictures and videos of one's own: :func:`load_detector`, and the command ``dyhead predict``."""

from dyhead.prediction.detector import Detections, Detector, load_detector

__all__ = ["Detections", "Detector", "load_detector"]
