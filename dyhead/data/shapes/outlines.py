"""The outlines of the shapes, as signed distances.

Each function takes points (x, y) and returns their distance to the outline, negative inside. The circle around each
shape has radius 1.
"""

import numpy as np


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(y, np.abs(x) * 0.75**0.5 - y * 0.5) - 0.5


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 0.95, 0.31), _box(x, y, 0.31, 0.95))


def _star(x: np.ndarray, y: np.ndarray, inner: float = 0.45) -> np.ndarray:
    # Symmetry folds all ten edges onto one: from the tip (1, 0) to the inner corner at 36 degrees.
    tenth = np.pi / 5
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    angle = np.abs(angle - np.round(angle / (2 * tenth)) * (2 * tenth))
    along = np.array([inner * np.cos(tenth) - 1, inner * np.sin(tenth)])
    normal = np.array([along[1], -along[0]]) / np.hypot(*along)
    return (radius * np.cos(angle) - 1) * normal[0] + radius * np.sin(angle) * normal[1]


DISTANCES = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "triangle": _triangle,
    "square": lambda x, y: _box(x, y, 0.5**0.5, 0.5**0.5),
    "bar": lambda x, y: _box(x, y, 0.95, 0.31),
    "star": _star,
    "cross": _cross,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.775) - 0.225,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.75 - np.hypot(x - 0.5, y)),
}
