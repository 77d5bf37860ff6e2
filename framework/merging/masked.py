"""A checkpoint with entries set to zero for good, where masks say so."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.files.tensors import Form
from lightspan.merging.merger import Merger
from lightspan.merging.span import in_pieces, widest
from lightspan.merging.weights import Weights, open_weights, real_finite


class Masked(Merger):
    """theta = theta_0 * m_1 * m_2 * ...: what any mask has 0 for becomes 0, tensors that none names stay as they are.

    Several masks prune together what each would: they are one edit for several groups of prompts.

    Args:
        masks: safetensors files with a mask for each tensor that they name, as `lightspan run` writes them
            (`result.safetensors`); booleans, or factors.
        prefix: of the masks' names, which those of the checkpoint lack: of a network that was wrapped in another.
    """

    def __init__(self, masks: list[ReadPath], prefix: str = "") -> None:
        if not masks:
            raise UserError("Masked got no mask; name one or more files under `masks`")
        self.masks, self.prefix = list(masks), prefix
        self._of: dict[str, list[tuple[Weights, str]]] = {}  # the masks of each tensor: its file, and its name there

    @cached_property
    def _files(self) -> dict[str, Weights]:
        return {path: open_weights(path) for path in self.masks}

    def leading(self, names: Sequence[str]) -> str:
        if len(names) != 1:
            raise UserError(f"Masked takes one checkpoint, and got {', '.join(names) or 'none'}; name it alone")
        return names[0]

    def prepared(self, checkpoints: Mapping[str, Weights], forms: Mapping[str, Form]) -> Self:
        """Raises: UserError for a mask of a tensor that the checkpoint has not, or has in another shape, and for one
        that is not real and finite.
        """
        (checkpoint,) = checkpoints.values()
        ready = type(self)(self.masks, self.prefix)
        for path, file in self._files.items():
            for name, form in file.forms.items():
                plain = name.removeprefix(self.prefix)
                kept = checkpoint.aliases.get(plain, plain)  # several names of one tensor may each have its mask
                if kept not in forms:
                    raise UserError(
                        f"{path} masks {plain}, and the checkpoint has no such tensor of floats; it has "
                        f"{', '.join(list(forms)[:3]) or 'none'}: take a mask that was made for this network, and set "
                        f"merger.init_args.prefix, now {self.prefix!r}, to what only the mask's names begin with"
                    )
                if forms[kept].shape != form.shape:
                    raise UserError(
                        f"{path}: the mask of {name} is {list(form.shape)}, the tensor {list(forms[kept].shape)}"
                    )
                real_finite(file, name, "mask entry")
                ready._of.setdefault(kept, []).append((file, name))
        return ready

    def tensor(self, name: str, form: Form, weights: Mapping[str, Tensor]) -> Tensor:
        (tensor,) = weights.values()
        for file, own in self._of.get(name, ()):
            # Not a product alone: an infinite number times 0 is NaN.
            tensor = in_pieces(
                form.dtype, lambda x, m: torch.where(m == 0, 0, widest(x) * m.double()), tensor, file.read(own)
            )
        return tensor.to(form.dtype)
