"""The error of this package."""

from collections.abc import Iterator
from contextlib import contextmanager


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or key, what was expected and what came."""


@contextmanager
def as_config_errors() -> Iterator[None]:
    """For the engines: a :class:`CheckpointError` inside becomes a :class:`dyhead.config.ConfigError`."""
    from dyhead.config import ConfigError  # not before: conversions need no configuration

    try:
        yield
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
