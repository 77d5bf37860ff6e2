"""Tokenizers that are trained on texts: pieces of bytes, so that every text comes back as it was.

Sources: byte-pair encoding as in Sennrich et al., 2016, arXiv 1508.07909, on bytes as in GPT-2; unigram pieces as in
Kudo, 2018, arXiv 1804.10959, learned by SentencePiece.
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lightspan.core.errors import UserError, install_extra

Kind = Literal["bpe", "unigram"]
SPECIAL = ("<pad>", "<start>", "<end>", "<mask>")
"""Have the first numbers."""
SMALLEST = len(SPECIAL) + 256
"""Numbers of a tokenizer without any piece of two bytes."""
RARER = 10.0
"""Nats by which a byte that no text has is less likely than any piece."""


def trained_tokenizer(texts: Iterable[str], size: int, kind: Kind = "bpe") -> PreTrainedTokenizerFast:
    """A tokenizer of at most `size` numbers, the same for the same texts; fewer if they are too short for more.

    Texts are cut before words, numbers and runs of spaces, as GPT-2's are, and a piece never crosses a cut. Special
    tokens are <pad>, <start>, <end> and <mask>, 0 to 3, and the next 256 or more are bytes and pieces of them: there is
    no unknown text. With special tokens, a text becomes <start> text <end>.

    Args:
        kind: bpe joins the most frequent pair of pieces, again and again. unigram prunes many pieces to those under
            which the texts are most likely, as SentencePiece does, which it needs.
    Raises: UserError for a size below 260, without any text, and without SentencePiece for unigram pieces.
    """
    if size < SMALLEST:
        raise UserError(
            f"size={size} has no room for 256 bytes and {len(SPECIAL)} special tokens; give {SMALLEST} or more"
        )
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    given = _Counted(texts)
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = cut
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[*SPECIAL],
            initial_alphabet=sorted(cut.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(given, trainer)
    else:
        counts = Counter(word for text in given for word, _ in cut.pre_tokenize_str(text))
        pieces = [(piece, 0.0) for piece in SPECIAL] + _unigram(counts, size - len(SPECIAL), sorted(cut.alphabet()))
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=None))
        tokenizer.add_special_tokens([*SPECIAL])
        tokenizer.pre_tokenizer = cut
    if not given.count:
        raise UserError("there is no text to train a tokenizer on; name another folder")
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>",
        pair="<start> $A <end> $B <end>",
        special_tokens=[(token, SPECIAL.index(token)) for token in ("<start>", "<end>")],
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class _Counted:
    """Texts, counted as they pass."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts, self.count = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.count += bool(text)
            yield text


def _unigram(counts: Counter[str], size: int, alphabet: list[str]) -> list[tuple[str, float]]:
    """Pieces and their log likelihoods.

    SentencePiece's own trainer: that of the library tokenizers sums in the order of a hash table, another in each
    process.
    """
    if find_spec("sentencepiece") is None:
        raise UserError(f"a unigram tokenizer is trained by SentencePiece; {install_extra('text')}")
    import sentencepiece

    if not counts:
        return []
    seen = {character for word in counts for character in word}
    unseen = [character for character in alphabet if character not in seen]
    written = io.BytesIO()
    with TemporaryDirectory() as folder:
        file = Path(folder, "words.tsv")
        file.write_text("".join(f"{word}\t{count}\n" for word, count in sorted(counts.items())), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(file),
            input_format="tsv",
            model_writer=written,
            model_type="unigram",
            vocab_size=1 + size - len(unseen),  # its unknown piece is left out below
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentence_length=2**30,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_unicode_script=False,
            split_by_number=False,
            split_by_whitespace=False,
            num_threads=1,
            minloglevel=2,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
        )
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    pieces = [(model.id_to_piece(i), float(model.get_score(i))) for i in range(1, model.get_piece_size())]
    least = min((score for _, score in pieces), default=0.0)
    return pieces + [(character, least - RARER) for character in unseen]
