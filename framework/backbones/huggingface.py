"""Networks and tokenizers from folders as transformers writes them: the one place that opens such a folder.

transformers runs code that a folder brings along once somebody agrees on the terminal, and unasked follows settings to
adapters, kernels of the hub, packages for quantisation and weights elsewhere. Here it gets no folder of weights: of
`config.json` it sees the settings that the network's own class declares, and the weights come as tensors, read from the
folder's safetensors files.
"""

import dataclasses
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lightspan.errors import UserError, one_line
from lightspan.files import expanded
from lightspan.foreign import content_of, settings_object
from lightspan.tensor_files import safetensors_of, stored_tensors

N = TypeVar("N", bound=PreTrainedModel)

CONFIG = "config.json"
_UNDECLARED = {"tie_word_embeddings", "scale_decoder_outputs", "decoder_start_token_id"}
"""Settings that the networks read although their config's class declares no such field."""
_MOST_UNSTORED = 2.0
"""How many times as many numbers a network may have as its files: a tied table is stored once."""


def stored_network(kind: type[N], folder: str, name: str, **settings: object) -> N:
    """A network in training mode, with its weights as safetensors.

    Args:
        kind: the class of transformers.
        name: what it is called in messages.
        settings: for the constructor.
    Raises: UserError if the folder has none, or one whose settings and weights do not belong to each other.
    """
    place = expanded(folder, "the folder of the network")
    if not (place / CONFIG).is_file():
        raise UserError(f"there is no {name} in {place}; save one there with transformers' save_pretrained")
    if not (files := safetensors_of(place)):
        raise UserError(f"{place} has no safetensors files; save the network there with transformers' save_pretrained")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= stored_tensors(file, "save the folder again")[0]
    try:
        config = _config(kind, settings_object(place / CONFIG), weights)
        _require_as_large(kind, config, weights, settings)
        network, found = kind.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, attn_implementation="sdpa", **settings
        )
    except Exception as error:  # whatever transformers and torch raise for settings that they do not know
        raise UserError(f"{place} has no {name} that transformers can read: {one_line(error)[:400]}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{place} has no whole {name}: its files lack {len(missing)} weights, such as {missing[0]}; save the "
            "folder again"
        )
    return network.train()


def stored_tokenizer_of(folder: Path, **settings: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; `settings` are those of `AutoTokenizer.from_pretrained`.

    Raises: UserError where transformers has no tokenizer of its own that reads the folder's files.
    """
    try:
        for file in sorted(folder.glob("*.json")):  # the files that are read whole, before anything is made of them
            content_of(file)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)
    except Exception as error:  # whatever transformers, tokenizers, protobuf and sentencepiece raise
        raise UserError(f"{folder} has no tokenizer that transformers can read: {one_line(error)[:400]}") from error


def _config(kind: type[N], said: dict[str, object], weights: dict[str, Tensor]) -> object:
    """The settings that the network's class declares. Raises: ValueError for more layers than there are tensors."""
    known = {field.name for field in dataclasses.fields(kind.config_class)} | _UNDECLARED
    config = kind.config_class(**{name: value for name, value in said.items() if name in known})
    for name in ("num_hidden_layers", "num_decoder_layers"):
        layers = getattr(config, name, 1)
        if not 1 <= layers <= len(weights):
            raise ValueError(f"its {CONFIG} says {name}={layers:,}, and its files have {len(weights):,} tensors")
    return config


def _require_as_large(kind: type[N], config: object, weights: dict[str, Tensor], settings: dict[str, object]) -> None:
    """Builds the network without memory. Raises: ValueError if it would have far more numbers than are stored."""
    with torch.device("meta"):
        numbers = sum(weight.numel() for weight in kind(config, **settings).parameters())
    stored = sum(tensor.numel() for tensor in weights.values())
    if numbers > _MOST_UNSTORED * stored:
        raise ValueError(f"its {CONFIG} describes a network of {numbers:,} numbers, and its files have {stored:,}")
