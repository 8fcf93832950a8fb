"""`shapes`: a detection set that the project draws itself."""

SPECS: dict = dict.fromkeys(
    ["shapes_easy_train", "shapes_easy_val", "shapes_train", "shapes_val", "shapes_hard_train", "shapes_hard_val"]
)


def prepare(name: str, root: str) -> tuple[str, str]:
    """Draws the set into its cache below `root`, if it is not there, and returns its annotation file and picture folder."""
    raise NotImplementedError
