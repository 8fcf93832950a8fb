"""The error of this package."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or key, what was expected and what came."""
