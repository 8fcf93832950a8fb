"""Runs and pictures as for predictions."""

from tests.prediction.conftest import make_run, pictures

__all__ = ["make_run", "pictures"]
