"""A network with the weights of an earlier run."""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lightspan.core.absent import MissingFile, unless_missing
from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.places import ReadPath
from lightspan.core.files.tensors import stored_tensors
from lightspan.core.ties import every_name, require_ties
from lightspan.nn.bank_noise import BankNoise
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.heads.dino_head import DINOHead

# A recipe may name the functions listed here.
__all__ = ["decoder_with_weights", "dino_head_with_weights", "stored_linear", "stored_noise", "with_weights"]

CLIP_EPSILON = 1e-5  # of all image towers that timm has with a norm before the blocks
POSITIONS = re.compile(r"\bpos_embed is \[").search
_MOST_UNSTORED = 8
"""How many times as many parameters a network may make as its files have tensors: tied ones are stored once."""


def stored_linear(path: ReadPath, prefix: str = "head.") -> nn.Linear:
    """The linear layer of an earlier run, with its weights and of its size.

    Args:
        path, prefix: as in `with_weights`.
    Raises: UserError as `with_weights`, and if there is no matrix of that name.
    """
    state = tensors_behind(path, prefix)
    weight = state.get("weight")
    if weight is None or weight.ndim != 2:
        raise UserError(
            f"{path} has no linear layer {prefix.removesuffix('.')}: its tensor {prefix}weight is no matrix"
        )
    with torch.device("meta"):  # a matrix without columns may have any number of rows: none is made before all fit
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in state)
    require_fit(layer, state, path, prefix)
    layer.to_empty(device=torch.get_default_device())
    fill(layer, state, path, prefix)
    return layer


def with_weights(module: nn.Module, path: ReadPath, prefix: str = "backbone.") -> nn.Module:
    """Loads `module`, all of it, from a safetensors file and returns it.

    Names and shapes are compared, and which parameters are tied. Activations, the epsilon of norms and the like leave
    no trace in a file: for published weights take a builder that has the settings of their name, such as
    `lightspan.backbones.published.timm_vit`.

    Args:
        path: as `lightspan export RUN --to safetensors` writes it.
        prefix: of the names in the file that belong to `module`; other names are ignored.
    Raises: MissingFile where there is no file; UserError for one that is not of this kind or of another network.
    """
    with unless_missing():
        fill(module, tensors_behind(path, prefix), path, prefix)
    return module


@contextmanager
def no_larger_than(tensors: int) -> Iterator[None]:
    """Inside, settings of others make a network on the meta device, which costs no memory but time: they may say any
    number of layers, whatever the name of that setting.

    Raises: ValueError once it makes far more parameters than the files have tensors.
    """
    made = count(1)

    def require(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if next(made) > _MOST_UNSTORED * tensors:
            raise ValueError(f"its settings describe more than {_MOST_UNSTORED} times the {tensors:,} tensors it has")

    handle = register_module_parameter_registration_hook(require)
    try:
        yield
    finally:
        handle.remove()


def fill(module: nn.Module, state: Mapping[str, Tensor], path: str, prefix: str) -> None:
    """Loads `module`, all of it, from tensors that a file has behind a prefix. Raises: UserError as `with_weights`."""
    require_fit(module, state, path, prefix)
    require_ties(module, state.__getitem__, path)
    first: dict[int, str] = {}
    for name in every_name(module):
        if (other := first.setdefault(id(state[name]), name)) != name:
            raise UserError(
                f"{other} and {name} are tied in {path}, and two tensors in {type(module).__name__}; make the network "
                "tied, as that file's was"
            )
    module.load_state_dict(state)
    if any(
        isinstance(norm := getattr(part, "norm_pre", None), nn.LayerNorm) and norm.eps != CLIP_EPSILON
        for part in module.modules()
    ):
        warnings.warn(
            f"the names in {path} are timm's for CLIP, whose norms have an epsilon of {CLIP_EPSILON}, and those of "
            f"{type(module).__name__} another; unless these are weights of your own, make the network with "
            "lightspan.backbones.published.timm_vit, which has CLIP's settings, its activation too",
            stacklevel=3,
        )


def require_fit(module: nn.Module, state: Mapping[str, Tensor], path: str, prefix: str = "") -> None:
    """Raises: UserError as `with_weights`, for tensors behind a prefix of a file that are not all those of `module`,
    which may be on the meta device.
    """
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - state.keys()]
    wrong += [f"{name} is not in the network" for name in state.keys() - own.keys()]
    wrong += [
        f"{name} is {[*state[name].shape]}, not {[*own[name].shape]}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if wrong:
        raise UserError(
            f"the tensors named {prefix}* in {path} do not fit {type(module).__name__}: {'; '.join(sorted(wrong)[:3])}"
            + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            + ("; lightspan.backbones.published.timm_vit resamples positions" if any(map(POSITIONS, wrong)) else "")
        )


def decoder_with_weights(decoder: MaskDecoder, path: ReadPath, prefix: str = "decoder.") -> MaskDecoder:
    """As `with_weights`, of an autoencoder's decoder, whose outputs, if open, become as many as the file's."""
    with unless_missing():
        head = tensors_behind(path, prefix).get("head.weight")
        # A narrow table may have any number of rows: of another width it gives no outputs, and nothing then fits.
        if head is not None and head.ndim == 2 and head.shape[1] == decoder.width and len(head):
            decoder.build(len(head))
    with_weights(decoder, path, prefix)
    return decoder


def dino_head_with_weights(head: DINOHead, path: ReadPath, prefix: str) -> DINOHead:
    """As `with_weights`, of a head of self-distillation, such as `teacher.module.head.` of an earlier run."""
    with_weights(head, path, prefix)
    return head


def stored_noise(path: ReadPath, weight: float = 0.1, seed: int = 0) -> BankNoise:
    """Noise from the features of pictures that a safetensors file holds as `bank`, [N S w].

    Raises: UserError for a file that is missing or has no bank, or as `BankNoise`.
    """
    bank_NSw = tensors_behind(path, "").get("bank")
    if bank_NSw is None:
        raise UserError(f"{path} has no tensor called bank: save the tokens of N pictures there as bank, [N, S, w]")
    return BankNoise(bank_NSw, weight, seed)


def tensors_behind(path: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of a file whose names begin with the prefix, without it. Raises: as `with_weights`."""
    file = expanded(path, "the file of weights")
    if not file.is_file():
        raise MissingFile(f"there are no weights at {file}; write them with `lightspan export RUN --to safetensors`")
    state, metadata = stored_tensors(file, "export it again")
    # Of tensors that share memory only one is stored, and the metadata names the others.
    state |= {name: state[kept] for name, kept in metadata.items() if kept in state}
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
