"""See `kernel_fixtures`."""

from kernel_fixtures import poisoned_memory, target

__all__ = ["poisoned_memory", "target"]
