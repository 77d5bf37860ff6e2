"""lightspan: training neural networks inside subspaces, at any scale, on PyTorch Lightning.

Importing this package loads neither torch nor Lightning, so that the command line answers at once.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["Method", "UserError", "__version__"]

if TYPE_CHECKING:
    from lightspan.core.errors import UserError as UserError
    from lightspan.training.method import Method as Method


def __getattr__(name: str) -> Any:
    if name == "Method":
        from lightspan.training.method import Method

        return Method
    if name == "UserError":
        from lightspan.core.errors import UserError

        return UserError
    raise AttributeError(f"module 'lightspan' has no attribute {name!r}")
