"""Texts of two domains, one with labels and one without, in the prompts of a language model.

Source: Uppaal et al., 2024, arXiv 2401.17514. No label of the target domain can be reached while a network learns: the
texts of the target have none (`UnlabelledTexts`), and a file with labels to judge by is read by the test alone.
Shapes: T tokens of a prompt, K labels, U tokens of a label's words.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.order import content_of
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, held_out_size, require_enough, spaced
from lightspan.datamodules.text.batch import DenoisingBatch, PromptBatch
from lightspan.datamodules.text.denoising import DenoisingTokens, appended, corrupted
from lightspan.datamodules.text.documents import TextTokens, encoded, numbers_of
from lightspan.datamodules.text.forms import padded
from lightspan.datamodules.text.json_lines import json_lines, text_in
from lightspan.datamodules.text.word_choices import RandomWords, WordChoice, plain_word

SIDES = {
    "input_segments": ("inputs", "input_segments"),
    "target_input_segments": ("target_inputs", "target_input_segments"),
    "target_segments": ("targets", "decoder_inputs", "target_segments", "target_bytes", "denoiser"),
}
"""Of the batches of both stages: fields of one length, by the one that tells what is padding."""


class LabelledTexts(NamedTuple):
    texts: list[str]
    labels: list[int]


class UnlabelledTexts:
    """Texts of a target domain, which have no label. Raises: UserError where one is asked for."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    @property
    def labels(self) -> list[int]:
        raise UserError(
            "texts of the target domain have no labels to learn from: that would be no unsupervised adaptation; judge "
            "with `lightspan test`, which reads the file with labels of the test"
        )


class Domains(ABC):
    """Where the texts come from. Labels are whole numbers from 0 up."""

    @abstractmethod
    def source(self) -> LabelledTexts: ...

    @abstractmethod
    def target(self) -> UnlabelledTexts: ...

    @abstractmethod
    def target_test(self) -> LabelledTexts:
        """Other texts of the target, to judge by. Raises: UserError if there are none."""


class DomainFiles(Domains):
    """Files with a JSON object a line: `text`, and where there are labels `label`, a whole number from 0 up.

    Args:
        source: with labels.
        target: of the other domain; labels in it are not read.
        test: of that domain, with labels.
    """

    def __init__(self, source: ReadPath, target: ReadPath, test: ReadPath | None = None) -> None:
        self.paths = {"source": source, "target": target, "test": test}

    def source(self) -> LabelledTexts:
        return _labelled(self._rows("source"))

    def target(self) -> UnlabelledTexts:
        return UnlabelledTexts([text_in(*line, "text") for line in self._rows("target")])

    def target_test(self) -> LabelledTexts:
        if self.paths["test"] is None:
            raise UserError("there are no labels of the target domain to judge by; name a file with them as test")
        return _labelled(self._rows("test"))

    def _rows(self, which: str) -> list[tuple[str, Any]]:
        """(where a line is, what it says)."""
        path = self.paths[which]
        assert path is not None
        return json_lines(path, f"data.init_args.domains.init_args.{which}", "text", "text")


def _labelled(rows: list[tuple[str, Any]]) -> LabelledTexts:
    texts = [text_in(*line, "text") for line in rows]
    for where, row in rows:
        label = row.get("label")
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise UserError(f"{where} has no label that is a whole number from 0 up")
    return LabelledTexts(texts, [row["label"] for _, row in rows])


@dataclass(frozen=True)
class Prompt:
    """The words around a text, the same in both stages, and the words of each label.

    Args:
        template: with {} where the text goes.
        labels: the words of each label, at least two, all different.
    """

    template: str = "Review: {} Sentiment:"
    labels: tuple[str, ...] = ("negative", "positive")

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise UserError(f"Prompt template={self.template!r} needs one {{}} where the text goes")
        if len(set(self.labels)) < max(2, len(self.labels)) or not all(word.strip() for word in self.labels):
            raise UserError(f"Prompt labels={[*self.labels]} must be at least two, all different and none empty")

    def around(self) -> tuple[str, str]:
        before, _, after = self.template.partition("{}")
        return before.strip(), after.strip()


class Words(NamedTuple):
    """A text by word. text: its tokens. word: int64 [L], the word of each. words: as they stand in the text."""

    text: TextTokens
    word: np.ndarray
    words: list[str]


class PromptReader:
    """Makes prompts of texts: tokens of the template and of as many of a text's words as fit between.

    Args:
        tokenizer: turns words into tokens; special tokens are its own affair and not added.
        prompt: the template.
        length: T, with <eos>.
        tokens: numbers of <pad>, <eos> and sentinels; None takes those behind the tokenizer's, with 100 sentinels.
    Raises: UserError for a length in which no word fits.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, length: int, tokens: DenoisingTokens | None
    ) -> None:
        require_numbers(length, length=length)
        self.tokenizer, self.prompt, self.length = tokenizer, prompt, length
        count, free = numbers_of(tokenizer)
        self.tokens = appended(count, 100) if tokens is None else tokens
        self.num_tokens = max(count, *(number + 1 for number in self.tokens.all()))
        if clashing := sorted(number for number in self.tokens.all() if number < count and number not in free):
            raise UserError(
                f"{len(clashing)} numbers of pad, eos, modes and sentinels are among the {count:,} that texts have, "
                f"the first: {clashing[0]}; leave tokens out to use numbers behind them"
            )
        self.around = [self.words(part).text for part in prompt.around()]
        self.room = length - 1 - sum(len(part.tokens) for part in self.around)
        if self.room < 2:
            raise UserError(f"length={length} leaves no room for a text in the template {prompt.template!r}; raise it")

    def words(self, text: str, room: int | None = None) -> Words:
        """A text of at most `room` tokens, whole words but for a first one that is longer."""
        columns, words, word = [TextTokens(np.zeros(0, np.int32), np.zeros(0, np.int32))], list[str](), list[int]()
        for one in text.split():
            made = encoded(one.encode("utf-8", "replace"), self.tokenizer)
            if room is not None and len(word) + len(made.tokens) > room:
                if words:
                    break
                made = TextTokens(*(column[:room] for column in made))
            if len(made.tokens):
                columns.append(made)
                word += [len(words)] * len(made.tokens)
                words.append(one)
        joined = TextTokens(*(np.concatenate(column) for column in zip(*columns, strict=True)))
        return Words(joined, np.asarray(word, np.int64), words)

    def hidden(self, text: Words, choice: WordChoice, generator: np.random.Generator) -> dict[str, Tensor]:
        """The prompt with words of the text hidden: a row of a `DenoisingBatch` but `index`."""
        mask = np.isin(text.word, choice.places(text.words, generator))
        before, after = self.around
        whole = TextTokens(*(np.concatenate(parts) for parts in zip(before, text.text, after, strict=True)))
        hidden = np.concatenate([np.zeros(len(before.tokens), bool), mask, np.zeros(len(after.tokens), bool)])
        inputs, targets, target_bytes = corrupted(whole, hidden, self.tokens, mode=None)
        pad, places = self.tokens.pad, self.length
        return {
            "inputs": padded(inputs, places, pad),
            "input_segments": padded(np.ones(len(inputs)), places),
            "decoder_inputs": padded(np.concatenate([[pad], targets[:-1]]), places + 1, pad),
            "targets": padded(targets, places + 1, pad),
            "target_segments": padded(np.ones(len(targets)), places + 1),
            "target_bytes": padded(target_bytes, places + 1),
            "denoiser": torch.zeros(places + 1, dtype=torch.int64),
        }

    def shown(self, text: Words) -> tuple[Tensor, Tensor]:
        """(inputs, segments), int64 [T]: the prompt as it is."""
        before, after = self.around
        inputs = np.concatenate([before.tokens, text.text.tokens, after.tokens, [self.tokens.eos]])
        return padded(inputs, self.length, self.tokens.pad), padded(np.ones(len(inputs)), self.length)

    def choices(self) -> dict[str, Tensor]:
        """The words of all labels, int64 [K U]: `choices`, `decoder_inputs`, `choice_segments`.

        Raises: UserError for labels that have the same tokens, or none.
        """
        said = [np.append(self.words(label).text.tokens, self.tokens.eos) for label in self.prompt.labels]
        if min(map(len, said)) < 2 or len({tuple(tokens.tolist()) for tokens in said}) < len(said):
            raise UserError(f"the tokenizer does not tell the labels {[*self.prompt.labels]} apart; choose other words")
        longest, pad = max(map(len, said)), self.tokens.pad
        return {
            "choices": torch.stack([padded(tokens, longest, pad) for tokens in said]),
            "decoder_inputs": torch.stack([padded(np.append([pad], t[:-1]), longest, pad) for t in said]),
            "choice_segments": torch.stack([padded(np.ones(len(tokens)), longest) for tokens in said]),
        }


class HiddenWords:
    """Samples of `DenoisingBatch`; the seed says which words are hidden."""

    batch_type = DenoisingBatch

    def __init__(self, reader: PromptReader, texts: Sequence[Words], choice: WordChoice) -> None:
        self.reader, self.texts, self.choice = reader, texts, choice

    def __len__(self) -> int:
        return len(self.texts)

    def arrays(self) -> list[np.ndarray]:
        """All that the samples consist of."""
        return [text.text.tokens for text in self.texts]

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        row = self.reader.hidden(self.texts[index], self.choice, np.random.default_rng(seed))
        return {**row, "index": torch.tensor(index)}


class PromptSamples:
    """Samples of `PromptBatch`, without labels if there are none; with target texts, one that the seed draws stands
    beside each.
    """

    def __init__(
        self, reader: PromptReader, texts: Sequence[Words], labels: Sequence[int] = (), target: Sequence[Words] = ()
    ) -> None:
        self.reader, self.texts, self.labels, self.target = reader, texts, labels, target
        self.choices = reader.choices()

    @property
    def batch_type(self) -> type | None:
        """None without labels, which a `PromptBatch` has."""
        return PromptBatch if self.labels else None

    def __len__(self) -> int:
        return len(self.texts)

    def arrays(self) -> list[np.ndarray]:
        """All that the samples consist of."""
        return [np.asarray(self.labels, np.int64), *(text.text.tokens for text in (*self.texts, *self.target))]

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        inputs, segments = self.reader.shown(self.texts[index])
        sample = {"inputs": inputs, "input_segments": segments, **self.choices}
        if self.target:
            drawn = int(np.random.default_rng(seed).integers(len(self.target)))
            names = ("target_inputs", "target_input_segments")
            sample |= dict(zip(names, self.reader.shown(self.target[drawn]), strict=True))
        sample |= {"label": torch.tensor(self.labels[index])} if self.labels else {}
        return sample | {"index": torch.tensor(index)}


class DomainTexts(SampleSets):
    """What both stages share.

    Args:
        domains: where the texts come from.
        tokenizer, prompt, length, tokens: as in `PromptReader`; the same in both stages.
        val_size: texts of the source held out to validate on, at least 1: of each label its share, evenly spaced. None
            takes a tenth, at most 200.
        settings: those of `SampleSets`.

    Attributes:
        num_tokens: numbers of tokens, from 0 up, with sentinels.
        inputs, targets: the most tokens that a network reads and says.
    """

    targets: int

    def __init__(
        self,
        domains: Domains,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt | None = None,
        length: int = 128,
        tokens: DenoisingTokens | None = None,
        val_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if val_size is not None and val_size < 1:
            raise UserError(f"val_size={val_size} must be at least 1: settings are chosen by the source alone")
        self.domains, self.reader = domains, PromptReader(tokenizer, prompt or Prompt(), length, tokens)
        self.num_tokens, self.inputs = self.reader.num_tokens, length
        self.val_size = val_size

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Leaves out the columns in which no text of the batch has a token."""
        for side, own in SIDES.items():
            if side in batch:
                longest = max(1, int(batch[side].sum(dim=1).max()))
                batch |= {name: batch[name][:, :longest] for name in own if name in batch}
        return batch

    def training_content(self) -> str:
        return content_of(self.train.arrays())  # type: ignore[union-attr]

    def divided(self) -> tuple[LabelledTexts, LabelledTexts]:
        """The source: (to train on, to validate on). Raises: UserError for labels that have no words."""
        source = self.domains.source()
        self._require_words(source)
        size = held_out_size(self.val_size, len(source.texts), most=200)
        require_enough(None, size, len(source.texts), "texts of the source domain")
        # By label: evenly spaced places of a file whose labels take turns may all have one label.
        by_label = np.argsort(source.labels, kind="stable")
        held = set(spaced(by_label, size).tolist())
        sides = [[place for place in range(len(source.texts)) if (place in held) is side] for side in (False, True)]
        train, val = (
            LabelledTexts([source.texts[place] for place in side], [source.labels[place] for place in side])
            for side in sides
        )
        return train, val

    def read(self, texts: Sequence[str]) -> list[Words]:
        """Raises: UserError for a text of which the tokenizer leaves nothing."""
        read = [self.reader.words(text, self.reader.room) for text in texts]
        if empty := [text for text, words in zip(texts, read, strict=True) if not words.words]:
            raise UserError(f"the tokenizer leaves nothing of the text {empty[0][:40]!r}; remove it")
        return read

    def _require_words(self, labelled: LabelledTexts) -> None:
        words = self.reader.prompt.labels
        if max(labelled.labels) >= len(words):
            raise UserError(f"texts have labels up to {max(labelled.labels)}, and the prompt words for {len(words)}")


class DomainDenoising(DomainTexts):
    """The first stage: raw texts of both domains in the prompt, with words of the text hidden; `DenoisingBatch`.

    The source's labels are read by `hide` alone, which may rank words by them; the target's never.

    Args:
        hide: which words are hidden; None is 15 in a hundred at random.
        source_alone: leaves the target out: what pre-training without the target domain is worth.
        settings: those of `DomainTexts`.
    """

    def __init__(
        self,
        domains: Domains,
        tokenizer: PreTrainedTokenizerBase,
        hide: WordChoice | None = None,
        source_alone: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(domains, tokenizer, **settings)
        self.hide, self.source_alone = hide or RandomWords(), source_alone
        self.targets = self.inputs + 1

    def setup(self, stage: str | None = None) -> None:
        """Reads, divides and tokenises, once."""
        if self.train is not None:
            return
        train, val = self.divided()
        self.hide.learn([[plain_word(word) for word in text.split()] for text in train.texts], train.labels)
        target = [] if self.source_alone else self.domains.target().texts
        both = self.read([*train.texts, *target])
        held = self.read(val.texts)
        self._require_sentinels(max(len(text.words) for text in (*both, *held)))
        self.train = self.bank = HiddenWords(self.reader, both, self.hide)
        self.val = HiddenWords(self.reader, held, self.hide)
        say(f"domains: {len(train.texts)} texts of the source and {len(target)} of the target, without labels")

    def _require_sentinels(self, words: int) -> None:
        """Raises: UserError if the longest text may have more spans than there are sentinels."""
        hidden, available = self.hide.count(words), self.reader.tokens.sentinels
        if (spans := min(hidden, words - hidden + 1)) > available:
            raise UserError(
                f"{hidden} words are hidden in a text of {words}, in up to {spans} spans, and there are {available} "
                "sentinels; lower length or the rate of hide, or name more in data.init_args.tokens"
            )


class DomainPrompts(DomainTexts):
    """The second stage: labelled texts of the source in the prompt, `PromptBatch`, each beside an unlabelled one of the
    target, for methods that align both. Validation is of the source, the test of labelled texts of the target, and
    predictions are for its raw texts.

    Args:
        settings: those of `DomainTexts`.
    """

    num_classes: int

    def __init__(self, domains: Domains, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> None:
        super().__init__(domains, tokenizer, **settings)
        self.targets = self.reader.choices()["choices"].shape[1]

    def setup(self, stage: str | None = None) -> None:
        """Reads, divides and tokenises, once; labels of the target only for a test."""
        if self.train is None:
            train, val = self.divided()
            target, texts = self.read(self.domains.target().texts), self.read(train.texts)
            self.train = PromptSamples(self.reader, texts, train.labels, target)
            self.bank = PromptSamples(self.reader, texts, train.labels)
            self.val = PromptSamples(self.reader, self.read(val.texts), val.labels)
            say(
                f"domains: {len(texts)} labelled texts of the source to train on, {len(val.texts)} to validate on, "
                f"{len(target)} of the target without labels"
            )

    def test_dataloader(self) -> EvaluationLoader:
        labelled = self.domains.target_test()
        self._require_words(labelled)
        return self._evaluate(PromptSamples(self.reader, self.read(labelled.texts), labelled.labels))

    def predict_dataloader(self) -> EvaluationLoader:
        """The raw texts of the target, in the order of their file."""
        return self._evaluate(PromptSamples(self.reader, self.read(self.domains.target().texts)))
