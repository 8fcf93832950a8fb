"""The one error of the data part."""


class DataError(ValueError):
    """A data set, an annotation file or a picture cannot be used. The message names it and says what was expected."""
