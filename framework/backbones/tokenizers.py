"""Tokenizers that need no file, and those of transformers that are in a folder. Nothing is downloaded."""

import re
import zlib
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase

from lightspan.backbones.huggingface import stored_tokenizer_of
from lightspan.core.absent import MissingFile
from lightspan.core.errors import UserError, install_extra
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import content_of
from lightspan.core.files.places import ReadPath

# A recipe may name the functions listed here.
__all__ = ["HashedWords", "Letters", "stored_tokenizer"]

SPECIAL = {"<pad>": 0, "<start>": 1, "<end>": 2}
SENTENCE_PIECE = ".model"


class HashedWords(PreTrainedTokenizer):
    """Whole words in lower case, each numbered by its CRC-32: no vocabulary that would have to be learned or kept.

    A text becomes <start> words <end>. Punctuation is left out. Two words may get the same number: of a
    thousand words about one in eight does with 8,192 numbers.

    Args:
        size: numbers of words and of the three special tokens, at least 4.
    """

    def __init__(self, size: int = 8192) -> None:
        if size < 4:
            raise UserError(f"HashedWords size={size} leaves no number for words; it must be at least 4")
        self.size = size
        pad, start, end = SPECIAL
        super().__init__(pad_token=pad, bos_token=start, eos_token=end)

    @property
    def vocab_size(self) -> int:
        return self.size

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return dict(SPECIAL)

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return re.findall(r"\w+", text.lower())

    def _convert_token_to_id(self, token: str) -> int:
        if token in SPECIAL:
            return SPECIAL[token]
        return len(SPECIAL) + zlib.crc32(token.encode()) % (self.size - len(SPECIAL))

    def build_inputs_with_special_tokens(self, ids: list[int], pair: list[int] | None = None) -> list[int]:
        return [SPECIAL["<start>"], *ids, *(pair or []), SPECIAL["<end>"]]


class Letters(PreTrainedTokenizer):
    """Single letters of ASCII in lower case: a text becomes <start> letters <end>, and what is no ASCII is left out.

    For text encoders that have to know how a word is spelled.
    """

    def __init__(self) -> None:
        pad, start, end = SPECIAL
        super().__init__(pad_token=pad, bos_token=start, eos_token=end)

    @property
    def vocab_size(self) -> int:
        return 128 + len(SPECIAL)

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return dict(SPECIAL)

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        return [letter for letter in text.lower() if letter.isascii()]

    def _convert_token_to_id(self, token: str) -> int:
        return SPECIAL[token] if token in SPECIAL else len(SPECIAL) + ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return [*SPECIAL][index] if index < len(SPECIAL) else chr(index - len(SPECIAL))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, ids: list[int], pair: list[int] | None = None) -> list[int]:
        return [SPECIAL["<start>"], *ids, *(pair or []), SPECIAL["<end>"]]


def stored_tokenizer(folder: ReadPath) -> PreTrainedTokenizerBase:
    """A tokenizer in a folder as transformers writes it, such as that of CLIP with its 49,408 pairs of bytes, or one
    that `lightspan data tokenizer` has trained. A file of SentencePiece is one too, NAME.model.

    Raises: UserError if there is none, or a file of SentencePiece cannot be read.
    """
    place = expanded(folder, "the folder of the tokenizer")
    if place.suffix == SENTENCE_PIECE and place.is_file():
        return _of_sentence_piece(place)
    if not place.is_dir():
        raise MissingFile(f"there is no tokenizer in {place}; save one there with transformers' save_pretrained")
    return stored_tokenizer_of(place)


def _of_sentence_piece(file: Path) -> PreTrainedTokenizerBase:
    """That of transformers with the same pieces: it reads a folder, in which the file has a fixed name."""
    if find_spec("sentencepiece") is None:
        raise UserError(f"{file} is read with the package sentencepiece; {install_extra('text')}")
    try:
        content = content_of(file)
    except ValueError as error:
        raise UserError(f"{file} is no model of SentencePiece: {error}") from error
    with TemporaryDirectory() as folder:
        Path(folder, "tokenizer.model").write_bytes(content)
        try:
            return stored_tokenizer_of(Path(folder))
        except UserError as error:
            raise UserError(f"{file} is no model of SentencePiece: {error.__cause__}") from error
