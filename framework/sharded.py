"""A rank's part of a tensor, and the whole tensor. Both are the same for plain tensors, so code need not ask."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, gathered if ranks have one each; all of them must call it then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
