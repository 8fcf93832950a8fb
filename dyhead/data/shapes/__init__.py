"""`shapes`: a detection dataset that the project draws itself, so that a new machine can train without a download.

Every image shows shapes of random class, size, rotation and colour; later ones cover earlier ones. There are three
difficulties, each with a training and a validation set: `shapes_easy_*`, `shapes_*` and `shapes_hard_*`.
docs/shapes.md shows them.

* `specification`: what each set looks like.
* `drawing`: one image and its annotations.
* `cache`: a whole set on disk.
* `python -m dyhead.data.shapes`: draws or previews sets.
"""

from dyhead.data.shapes.cache import prepare
from dyhead.data.shapes.drawing import draw
from dyhead.data.shapes.specification import SPECS, Spec

__all__ = ["SPECS", "Spec", "draw", "prepare"]
