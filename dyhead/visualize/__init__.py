"""Pictures of what a trained DyHead does: maps after each attention, where it samples, how it weighs levels."""

from dyhead.visualize.tracing import BlockTrace, Trace, traced

__all__ = ["BlockTrace", "Trace", "traced"]
