"""The error that everything in `dyhead.data` raises."""


class DataError(ValueError):
    """A dataset, an annotation file or an image cannot be used. The message names it and says what was expected."""
