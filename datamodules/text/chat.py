"""Conversations, and prompts with their completions, from a file of the user's: a language model reads all of them and
learns what it is to say itself.

Shapes: N conversations, T tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import TooMuchError, bounded_program
from lightspan.core.files.places import ReadPath
from lightspan.core.tokenizing import cut
from lightspan.datamodules.loading.order import content_of
from lightspan.datamodules.loading.ranks import say
from lightspan.datamodules.loading.sample_sets import SampleSets, require_val_size, split_rows
from lightspan.datamodules.text.batch import ChatBatch
from lightspan.datamodules.text.documents import Skipped
from lightspan.datamodules.text.forms import joined_in_training, padded
from lightspan.datamodules.text.json_lines import json_lines
from lightspan.datamodules.text.packing import packed, trimmed
from lightspan.datamodules.text.tokenized import require_length

LEARNER = "assistant"
SIDES = {"mask": ("tokens", "learned")}
"""Of a `ChatBatch`."""

Message = dict[str, str]


class Conversation(NamedTuple):
    """A line of a file: what was said so far, and what is to be said.

    Attributes:
        where: the line, for messages.
        messages: each with role and content; of a prompt with its completion none.
        texts: the prompt and its completion.
    """

    where: str
    messages: tuple[Message, ...]
    texts: tuple[str, str] = ("", "")

    @property
    def answers(self) -> list[str]:
        """What is to be learned."""
        said = [message["content"] for message in self.messages if message["role"] == LEARNER]
        return said if self.messages else [self.texts[1]]


class RenderedPart(NamedTuple):
    """Of a rendered conversation."""

    text: str
    learned: bool


def row_of(where: str, found: Any) -> Conversation:
    """A row of what a JSON says. Raises: UserError that names the line for what is none."""
    if not isinstance(found, dict) or ("messages" in found) == ("prompt" in found):
        raise UserError(
            f'{where} has no conversation; write {{"messages": [{{"role": "user", "content": "..."}}, ...]}} or '
            '{"prompt": "...", "completion": "..."}'
        )
    if "prompt" in found:
        for name in ("prompt", "completion"):
            if not isinstance(found.get(name), str):
                raise UserError(f"{where} has no {name} that is a text")
        return Conversation(where, (), (found["prompt"], found["completion"]))
    messages = found["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages must be a list of at least one")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(
                f"{where}: message {number} must have a role and a content, both texts; calls of tools are not read"
            )
    if not any(message["role"] == LEARNER for message in messages):
        raise UserError(f"{where} has no message of the role {LEARNER}, and those are what is learned")
    return Conversation(where, tuple({key: message[key] for key in ("role", "content")} for message in messages))


@dataclass(frozen=True)
class Renderer:
    """What a tokenizer makes of a row.

    Args:
        turns: which answers of a conversation are learned.
    """

    tokenizer: PreTrainedTokenizerBase
    turns: Literal["all", "last"] = "all"

    def parts(self, row: Conversation) -> list[RenderedPart]:
        """The text of a row, cut where what is learned begins and ends.

        The template of the tokenizer writes conversations. Without one, a message is `role: content` on a line, and the
        tokenizer's end of text follows an answer. It also follows a completion.
        A first message of the assistant answers nothing and is only read.

        Raises: UserError for a conversation that the template refuses, or writes differently once more follows, and
            for a template that takes too much time or memory.
        """
        try:
            with bounded_program():
                return self._parts(row)
        except TooMuchError as error:
            raise UserError(f"{row.where}: the tokenizer's template cannot write this conversation: {error}") from error

    def _parts(self, row: Conversation) -> list[RenderedPart]:
        start, end = self._start(), self.tokenizer.eos_token or ""
        if not row.messages:
            return [RenderedPart(start + row.texts[0], False), RenderedPart(row.texts[1] + end, True)]
        # transformers renders no prompt for a first message, so none can be asked for later.
        answers = [number for number, message in enumerate(row.messages) if number and message["role"] == LEARNER]
        chosen = answers if self.turns == "all" else answers[-1:]
        if self.tokenizer.chat_template is None:
            parts = [RenderedPart(start, False)]
            for number, message in enumerate(row.messages):
                said = f" {message['content']}" + (end if message["role"] == LEARNER else "")
                parts += [
                    RenderedPart(f"{message['role']}:", False),
                    RenderedPart(said, number in chosen),
                    RenderedPart("\n", False),
                ]
            return parts
        whole, at = self._rendered(row, len(row.messages)), 0
        parts = []
        for number in chosen:
            before = self._rendered(row, number, add_generation_prompt=True)
            after = whole if number == len(row.messages) - 1 else self._rendered(row, number + 1)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= at):
                raise UserError(
                    f"{row.where}: the tokenizer's template writes message {number + 1} differently once others "
                    "follow, so what is to be learned of it is not certain; set data.init_args.turns=last, or give "
                    "each answer a line of its own"
                )
            parts += [RenderedPart(whole[at : len(before)], False), RenderedPart(whole[len(before) : len(after)], True)]
            at = len(after)
        return [*parts, RenderedPart(whole[at:], False)]

    def tokens(self, row: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, whether each is learned), int32 and bool [T]. The first has nothing before it and is not learned.

        A conversation is cut into tokens as a whole, as for generation, where the tokenizer tells where tokens stand; a
        token belongs to the part in which it begins. Other tokenizers cut each part by itself.
        """
        tokens, learned = self.tokens_of(row.where, self.parts(row))
        learned[:1] = False
        return tokens, learned

    def tokens_of(self, where: str, parts: Sequence[RenderedPart]) -> tuple[np.ndarray, np.ndarray]:
        """As `tokens`, of a text that is rendered already, or a piece of one.

        Args:
            where: the line, for messages.
        """
        options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}  # they stand in the text; it is long
        if self.tokenizer.is_fast:
            ends = [*accumulate(len(part.text) for part in parts)]
            made = self._cut(where, "".join(part.text for part in parts), return_offsets_mapping=True, **options)
            tokens = np.asarray(made["input_ids"], dtype=np.int32)
            begins = np.asarray([begin for begin, _ in made["offset_mapping"]], dtype=np.int64)
            of = np.searchsorted(ends, begins, side="right").clip(max=len(parts) - 1)
        else:
            pieces = [self._cut(where, part.text, **options)["input_ids"] for part in parts]
            tokens = np.asarray([token for each in pieces for token in each], dtype=np.int32)
            of = np.repeat(np.arange(len(parts)), [len(each) for each in pieces])
        return tokens, np.asarray([part.learned for part in parts], dtype=bool)[of]

    def special_in(self, row: Conversation) -> bool:
        """Whether someone says what looks like a special token, and would begin or end a turn."""
        said = [*row.texts, *(message["content"] for message in row.messages)]
        return any(token in text for token in self.tokenizer.all_special_tokens for text in said)

    def _cut(self, where: str, text: str, **options: Any) -> Any:
        try:
            return cut(self.tokenizer, text, **options)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def _start(self) -> str:
        """The token that begins a text, if the tokenizer gives texts one."""
        first = cut(self.tokenizer, "")["input_ids"][:1]
        return self.tokenizer.bos_token if first and first == [self.tokenizer.bos_token_id] else ""

    def _rendered(self, row: Conversation, count: int, add_generation_prompt: bool = False) -> str:
        """The first messages, in the sandbox in which transformers runs templates."""
        try:
            return self.tokenizer.apply_chat_template(
                [*row.messages[:count]], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TooMuchError, MemoryError):
            raise
        except Exception as error:  # whatever Jinja raises, and what templates raise by themselves
            raise UserError(
                f"{row.where}: the tokenizer's template cannot write this conversation: {one_line(error)[:200]}"
            ) from error


class ChatSamples:
    """Samples of `ChatBatch`. The seed is not used: a conversation has nothing random.

    Args:
        rows: (tokens, whether each is learned), of at most `length` tokens each.
    """

    batch_type = ChatBatch

    def __init__(self, rows: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> None:
        self.length = length
        self.ends = np.cumsum([len(tokens) for tokens, _ in rows], dtype=np.int64)
        self.tokens = np.concatenate([tokens for tokens, _ in rows])
        self.learned = np.concatenate([learned for _, learned in rows])

    def __len__(self) -> int:
        return len(self.ends)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        own = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return {
            "tokens": padded(self.tokens[own], self.length),
            "mask": padded(np.ones(own.stop - own.start), self.length),
            "learned": padded(self.learned[own], self.length),
            "index": torch.tensor(index),
        }


class Chat(SampleSets):
    """Conversations of a file, one JSON object a line: `ChatBatch`. The model learns the messages of the assistant, or
    the completion, and reads the rest.

    A conversation that is longer than `length` is cut at its end. Left out, and counted in a line at the start, are
    those of which nothing is left to learn then, those with an empty answer, and those in which someone says a special
    token of the tokenizer, which would begin or end a turn.

    Args:
        path: lines such as {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]},
            or {"prompt": "...", "completion": "..."}.
        tokenizer: the network's own; its template writes conversations, see `Renderer.parts`.
        val_path: likewise, to validate on; None takes `val_size` of the first file.
        val_size: conversations, evenly spaced, at least 1; None takes a tenth of the file, at most 1,000.
        length: T, tokens of a row, at least 3.
        turns: "all" learns each answer of a conversation, "last" the last one: for templates that write earlier ones
            differently, such as without their thoughts.
        pack: whether several conversations share a row in training, where they fit. Each is read as if it were alone;
            the loss is the same, and rows are fewer.
        trim: whether columns that are padding in all rows of a batch to train on are left out, which saves their time;
            a network that is compiled is compiled anew for each width.
        batch_size: conversations of one optimiser step over all ranks.
        settings: the others of `SampleSets`.
    Raises: UserError at setup for a file that cannot be read, naming the line, or too few conversations.
    """

    def __init__(
        self,
        path: ReadPath,
        tokenizer: PreTrainedTokenizerBase,
        val_path: ReadPath | None = None,
        val_size: int | None = None,
        length: int = 1024,
        turns: Literal["all", "last"] = "all",
        pack: bool = False,
        trim: bool = False,
        batch_size: int = 16,
        **settings: Any,
    ) -> None:
        super().__init__(batch_size, **settings)
        require_length(length)
        require_val_size(val_size)
        self.path, self.val_path, self.val_size, self.length = path, val_path, val_size, length
        self.renderer, self.pack, self.trim = Renderer(tokenizer, turns), pack, trim

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises all conversations, once."""
        if self.train is not None:
            return
        training, validation = split_rows(self._rows, self.path, self.val_path, self.val_size, "conversations")
        skipped = Skipped()
        self.val = self._samples(validation, skipped, "validation")
        self.train = self.bank = self._samples(training, skipped, "training")
        learned = int(self.train.learned.sum()) / len(self.train.tokens)
        say(
            f"conversations: {len(self.train):,} to train on, {len(self.val):,} to validate on, {learned:.1%} of the "
            f"tokens to train on are learned{skipped}"
        )

    def blank(self) -> ChatSamples | None:
        """Two rows full of what is learned, where the file is not here."""
        if expanded(self.path, "data.init_args.path").exists():
            return None
        row = np.zeros(self.length, np.int32), np.ones(self.length, bool)
        return ChatSamples([row, row], self.length)

    def training_content(self) -> str:
        return content_of([self.train.tokens, self.train.learned, self.train.ends])  # type: ignore[union-attr]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Packs and trims a batch to train on."""
        return joined_in_training(self, self.joined, batch)

    def joined(self, batch: Any) -> Any:
        """With `pack`, rows that several conversations share; with `trim`, no wider than the widest."""
        batch = packed(batch, SIDES) if self.pack else batch
        return trimmed(batch, SIDES) if self.trim else batch

    def _rows(self, path: str, setting: str) -> list[Conversation]:
        lines = json_lines(path, f"data.init_args.{setting}", "conversation", "messages")
        return [row_of(*line) for line in lines]

    def _samples(self, rows: Iterable[Conversation], skipped: Skipped, what: str) -> ChatSamples:
        kept = []
        for row in rows:
            if any(not answer.strip() for answer in row.answers):
                skipped.reasons["with an empty answer"] += 1
                continue
            if self.renderer.special_in(row):
                skipped.reasons["in which someone says a special token"] += 1
                continue
            tokens, learned = (column[: self.length] for column in self.renderer.tokens(row))
            if learned.any():
                kept.append((tokens, learned))
            else:
                skipped.reasons[f"with nothing to learn in their first {self.length} tokens"] += 1
        if not kept:
            raise UserError(
                f"no conversation to use for {what} is left{skipped}; raise data.init_args.length={self.length}, or "
                "give other lines"
            )
        return ChatSamples(kept, self.length)
