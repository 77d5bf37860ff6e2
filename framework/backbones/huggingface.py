"""Networks and tokenizers from folders as transformers writes them: the one place that opens such a folder.

transformers runs code that a folder brings along once somebody agrees on the terminal, and unasked follows settings to
adapters, kernels of the hub, packages for quantisation and weights elsewhere. Here it gets no folder of weights: of
`config.json` it sees the settings that the network's own class declares, and the weights come as tensors, read from the
folder's safetensors files.
"""

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
)

from lightspan.backbones.weights import no_larger_than
from lightspan.core.absent import MissingFile
from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import SETTINGS_BYTES, VOCABULARY_BYTES, content_of, settings_object
from lightspan.core.files.tensors import safetensors_of, stored_tensors
from lightspan.core.tokenizing import panics_as_errors

N = TypeVar("N", bound=PreTrainedModel)

CONFIG = "config.json"
_UNDECLARED = {"tie_word_embeddings", "scale_decoder_outputs", "decoder_start_token_id"}
"""Settings that the networks read although their config's class declares no such field."""
_VOCABULARIES = (
    "*token*.json", "*vocab*.json", "*tekken*.json", "*config.json", "chat_template.json", "byte_maps.json",
    "emoji.json", "normalizer.json", "word_pronunciation.json", "word_shape.json",
    "*vocab*.txt", "*merges*.txt", "dict.txt", "*.model", "*.spm", "*.codes", "*.tokenizer",
)  # fmt: skip
_TEMPLATES = "*.jinja", "additional_chat_templates/*.jinja"
_TOKENIZER_FILES = dict.fromkeys(_VOCABULARIES, VOCABULARY_BYTES) | dict.fromkeys(_TEMPLATES, SETTINGS_BYTES)
"""Vocabularies, settings and templates of conversations: whatever transformers reads for a tokenizer. Other files of
the folder, such as data, are not its.
"""
_TOKENIZER_CONFIG, _SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
_MOST_GROWTH = 2**12
_MOST_LAYERS = 2**16
_MOST_UNSTORED = 2.0
"""How many times as many numbers a network may have as its files: a tied table is stored once."""


def stored_network(kind: type[N], folder: str, name: str, dtype: torch.dtype | None = None, **settings: object) -> N:
    """A network in training mode, with its weights as safetensors. Inside `torch.device("meta")` it has none: of the
    files only the shapes are read then.

    Args:
        kind: the class of transformers.
        name: what it is called in messages.
        dtype: of the weights; None keeps that of the files.
        settings: for the constructor.
    Raises: UserError if the folder has none, or one whose settings and weights do not belong to each other.
    """
    place = expanded(folder, "the folder of the network")
    said = _said(place, name)
    if not (files := safetensors_of(place)):
        raise UserError(f"{place} has no safetensors files; save the network there with transformers' save_pretrained")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= stored_tensors(file, "save the folder again")[0]
    try:
        config = _config(kind, said, weights)
        empty = _as_large(kind, config, weights, settings)
        if torch.get_default_device().type == "meta":
            stored = next((tensor.dtype for tensor in weights.values() if tensor.is_floating_point()), None)
            return empty.to(dtype or stored).train()
        network, found = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype or "auto", output_loading_info=True, **settings
        )
    except Exception as error:  # whatever transformers and torch raise for settings that they do not know
        raise UserError(f"{place} has no {name} that transformers can read: {one_line(error)[:400]}") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{place} has no whole {name}: its files lack {len(missing)} weights, such as {missing[0]}; save the "
            "folder again"
        )
    network.name_or_path = network.config.name_or_path = str(place)  # PEFT's folders name their base by it
    return network.train()


def model_type_of(folder: str, name: str) -> str:
    """What a folder's config.json calls the architecture; empty where it does not.

    Args:
        name: what it is called in messages.
    Raises: UserError for a folder without a config.json that can be read.
    """
    found = _said(expanded(folder, "the folder of the network"), name).get("model_type")
    return found if isinstance(found, str) else ""


def kind_of(folder: str, causal: bool) -> type[PreTrainedModel]:
    """The class of transformers that reads the network of texts in a folder, as its config.json says.

    Args:
        causal: the class with the head of a language model, whose tokens see only those before them; otherwise the one
            without a head.
    Raises: UserError if transformers has no class of its own for it, or none of this kind.
    """
    place = expanded(folder, "the folder of the network")
    name = "causal language model" if causal else "text encoder"
    said = _said(place, name)
    model_type = said.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    config_class: Any = CONFIG_MAPPING[model_type] if known else None
    kind: Any = (MODEL_FOR_CAUSAL_LM_MAPPING if causal else MODEL_MAPPING).get(config_class, None) if known else None
    if kind is None or isinstance(kind, tuple) or kind.main_input_name != "input_ids" or config_class.sub_configs:
        raise UserError(
            f"transformers has no {name} for {place}, whose {CONFIG} says model_type={model_type!r:.80}; code in the "
            "folder is never run, so take a network whose class is part of transformers, and reads text alone"
        )
    if said.get("is_encoder_decoder", getattr(config_class, "is_encoder_decoder", False)):
        raise UserError(f"{place} has a {model_type}, an encoder with a decoder, and no {name}")
    if causal and not said.get("is_decoder") and config_class in MODEL_FOR_MASKED_LM_MAPPING:
        raise UserError(f"{place} has a {model_type}, whose tokens see those after them: it is no {name}")
    return kind


def stored_tokenizer_of(folder: Path, **settings: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; `settings` are those of `AutoTokenizer.from_pretrained`.

    Raises: UserError where transformers has no tokenizer of its own that reads the folder's files.
    """
    try:
        for pattern, limit in _TOKENIZER_FILES.items():  # which are read whole, before anything is made of them
            for file in sorted(folder.glob(pattern)):
                if not file.is_dir():
                    content_of(file, limit)
        _require_own_files(folder)
        config = {"config": _outline(folder)} if (folder / CONFIG).exists() else {}
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **config, **settings
            )
        _require_no_growth(tokenizer)
        return tokenizer
    except Exception as error:  # whatever transformers, tokenizers, protobuf and sentencepiece raise
        raise UserError(f"{folder} has no tokenizer that transformers can read: {one_line(error)[:400]}") from error


def _require_own_files(folder: Path) -> None:
    """Raises: ValueError for settings of a tokenizer that name a file elsewhere, which transformers would open."""
    if (tokens := folder / _SPECIAL_TOKENS).exists():  # transformers takes any setting from it
        strange = [name for name in settings_object(tokens) if not name.endswith(("_token", "_tokens"))]
        if strange:
            raise ValueError(f"its {_SPECIAL_TOKENS} says {strange[0]!r:.80}, which is no special token")
    file = folder / _TOKENIZER_CONFIG
    said = settings_object(file) if file.exists() else {}
    named = [name for name in said.get("fast_tokenizer_files") or () if Path(str(name)).name != name]
    opened = [said.get("vocab"), said.get("merges"), said.get("gguf_file")]
    opened += [*(said.get("init_inputs") or ()), *(said.get("sp_model_kwargs") or {}).values()]
    named += [each for each in opened if isinstance(each, str)]
    if named:
        raise ValueError(f"its {file.name} names {str(named[0])!r:.80}, which may be outside the folder")


def _require_no_growth(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: ValueError for replacements in a row that make a text much longer, each that of the one before: outside
    of Python, nothing stops them. They are looked for in what was made, whichever file of the folder had them.
    """
    growths = {}
    if (pieces := getattr(tokenizer, "sp_model", None)) is not None:
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(pieces.serialized_model_proto())
        growths["normalizer"] = _longest(model.normalizer_spec.precompiled_charsmap)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "decoder"):
        if (made := getattr(backend, part, None)) is not None:
            growths[part] = _growth(json.loads(made.__getstate__()))
    for part, growth in growths.items():
        if growth > _MOST_GROWTH:
            raise ValueError(f"its {part} makes texts more than {_MOST_GROWTH:,} times as long")


def _growth(step: Any) -> int:
    """How many times as long a text becomes at most, by a step as the library tokenizers describes it."""
    steps, growth = [step], 1
    while steps:
        step = steps.pop()
        if isinstance(step, dict):
            steps += [step.get("normalizer"), *(step.get("normalizers") or ()), *(step.get("decoders") or ())]
            charsmap = base64.b64decode(step.get("precompiled_charsmap") or "")
            growth *= max(1, len(step.get("content") or ""), _longest(charsmap))
    return growth


def _longest(charsmap: bytes) -> int:
    """Bytes of the longest text in SentencePiece's map of characters: a trie, after its size in four bytes, and the
    texts, each of which a zero ends.
    """
    return max(map(len, charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")))


def _outline(folder: Path) -> PreTrainedConfig:
    """What a folder says of its network, as far as it tells which tokenizer that has: no sizes, which may be any."""
    said = settings_object(folder / CONFIG)
    kind, tokenizer = said.get("model_type"), said.get("tokenizer_class")
    is_known = isinstance(kind, str) and kind in CONFIG_MAPPING
    config: PreTrainedConfig = CONFIG_MAPPING[kind]() if is_known else PreTrainedConfig()
    config.name_or_path, config.tokenizer_class = str(folder), tokenizer if isinstance(tokenizer, str) else None
    return config


def _said(place: Path, name: str) -> dict[str, Any]:
    """What a folder's config.json says. Raises: UserError if there is none, or it cannot be read."""
    if not (place / CONFIG).is_file():
        raise MissingFile(f"there is no {name} in {place}; save one there with transformers' save_pretrained")
    try:
        return settings_object(place / CONFIG)
    except ValueError as error:
        raise UserError(f"{place} has no {name} that transformers can read: {one_line(error)[:400]}") from error


def _config(kind: type[N], said: dict[str, object], weights: dict[str, Tensor]) -> Any:
    """The settings that the network's class declares. Those of older versions, such as rope_theta, become what the
    class makes of them. Raises: ValueError for no layers, or more than any network has.
    """
    understood = kind.config_class(**_modest(said))
    known = {field.name for field in dataclasses.fields(kind.config_class)} | _UNDECLARED
    attention = "sdpa" if kind._supports_sdpa else "eager"
    declared = {name: getattr(understood, name) for name in known if hasattr(understood, name)}
    config = kind.config_class(**declared, attn_implementation=attention)
    for name in ("num_hidden_layers", "num_decoder_layers"):
        layers = getattr(config, name, 1)
        if layers < 1:
            raise ValueError(f"its {CONFIG} says {name}={layers:,}")
    return config


def _modest(said: dict[str, Any]) -> dict[str, Any]:
    """Settings without the number of labels, for which a config makes a name each and no network here has a head.

    Raises: ValueError for more layers than any network has: a config lists of what kind each is.
    """
    kept = {}
    for name, value in said.items():
        if isinstance(value, int) and "layer" in name and value > _MOST_LAYERS:
            raise ValueError(f"its {CONFIG} says {name}={value:,}, and no network has more than {_MOST_LAYERS:,}")
        if name != "num_labels":
            kept[name] = _modest(value) if isinstance(value, dict) else value
    return kept


def _as_large(kind: type[N], config: object, weights: dict[str, Tensor], settings: dict[str, object]) -> N:
    """The network without memory. Raises: ValueError if it has far more numbers than are stored."""
    with torch.device("meta"), no_larger_than(len(weights)):
        network = kind(config, **settings)
    numbers = sum(weight.numel() for weight in network.parameters())
    stored = sum(tensor.numel() for tensor in weights.values())
    if numbers > _MOST_UNSTORED * stored:
        raise ValueError(f"its {CONFIG} describes a network of {numbers:,} numbers, and its files have {stored:,}")
    return network
