"""The error that everything in `dyhead.data` raises."""


class DataError(ValueError):
    """A dataset, an annotation file or an image cannot be used. The message names it and says what was expected."""

    def __init__(self, message: str) -> None:
        # A file's name need not be Unicode, but a message must be, to be printed and logged.
        super().__init__(message.encode(errors="backslashreplace").decode())
