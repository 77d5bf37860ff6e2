"""What a rank holds of a tensor, and all of it. Plain tensors are held whole, so code need not ask which it has."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, gathered where ranks hold some each; all of them have to call it then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
