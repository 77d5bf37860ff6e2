"""A network with the weights of an earlier run."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightspan.errors import UserError
from lightspan.nn.bank_noise import BankNoise
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.places import ReadPath

# A recipe may name the functions listed here.
__all__ = ["decoder_with_weights", "stored_linear", "stored_noise", "with_weights"]


def stored_linear(path: ReadPath, prefix: str = "head.") -> nn.Linear:
    """The linear layer of an earlier run, with its weights and of its size.

    Args:
        path, prefix: as in `with_weights`.
    Raises: UserError as `with_weights`, and if there is no matrix of that name.
    """
    state = _stored(path, prefix)
    weight = state.get("weight")
    if weight is None or weight.ndim != 2:
        raise UserError(
            f"{path} has no linear layer {prefix.removesuffix('.')}: its tensor {prefix}weight is no matrix"
        )
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in state)
    with_weights(layer, path, prefix)
    return layer


def with_weights(module: nn.Module, path: ReadPath, prefix: str = "backbone.") -> nn.Module:
    """Loads `module`, all of it, from a safetensors file and returns it.

    Args:
        path: as `lightspan export RUN --to safetensors` writes it.
        prefix: of the names in the file that belong to `module`; other names are ignored.
    Raises: UserError for a file that is missing, not of this kind, or belongs to another network.
    """
    file, state, own = Path(path).expanduser(), _stored(path, prefix), module.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - state.keys()]
    wrong += [f"{name} is not in the network" for name in state.keys() - own.keys()]
    wrong += [
        f"{name} is {[*state[name].shape]}, not {[*own[name].shape]}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if wrong:
        raise UserError(
            f"the tensors named {prefix}* in {file} do not fit {type(module).__name__}: {'; '.join(sorted(wrong)[:3])}"
            + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    module.load_state_dict(state)
    return module


def decoder_with_weights(decoder: MaskDecoder, path: ReadPath, prefix: str = "decoder.") -> MaskDecoder:
    """As `with_weights`, of an autoencoder's decoder, whose outputs, if open, become as many as the file's."""
    if (head := _stored(path, prefix).get("head.weight")) is not None:
        decoder.settle(len(head))
    with_weights(decoder, path, prefix)
    return decoder


def stored_noise(path: ReadPath, weight: float = 0.1, seed: int = 0) -> BankNoise:
    """Noise from the features of pictures that a safetensors file holds as `bank`, [N S w].

    Raises: UserError for a file that is missing or has no bank, or as `BankNoise`.
    """
    bank_NSw = _stored(path, "").get("bank")
    if bank_NSw is None:
        raise UserError(f"{path} has no tensor called bank: save the tokens of N pictures there as bank, [N, S, w]")
    return BankNoise(bank_NSw, weight, seed)


def _stored(path: str, prefix: str) -> dict[str, Tensor]:
    """The tensors of a file whose names begin with the prefix, without it. Raises: UserError, see `with_weights`."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"there are no weights at {file}; write them with `lightspan export RUN --to safetensors`")
    try:
        with safe_open(file, "pt") as stored:
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
            # Of tensors that share memory only one is stored, and the metadata names the others.
            state |= {name: state[kept] for name, kept in (stored.metadata() or {}).items() if kept in state}
    except SafetensorError as error:
        raise UserError(f"{file} is not a complete safetensors file ({error}); export it again") from error
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
