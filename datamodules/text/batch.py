"""Batches of texts.

Shapes: B texts, T tokens, P documents of a query, K labels, U tokens of a document or a label.
"""

from typing import Annotated, NotRequired, TypedDict

from torch import Tensor

from lightspan.core.batches import Field, Index, Label

Tokens = Annotated[Tensor, Field("int64", "B T", read=True)]
"""Of a text with its special tokens, each in [0, vocab_size); 0 on padding, which is at the end."""
Mask = Annotated[Tensor, Field("int64", "B T")]
"""1 where a token is the text's own and 0 on padding."""
Inputs = Annotated[Tensor, Field("int64", "B T")]
Choices = Annotated[Tensor, Field("int64", "B K U")]
Documents = Annotated[Tensor, Field("int64", "B P U")]
Targets = Annotated[Tensor, Field("int64", "B U")]


class TextBatch(TypedDict):
    """Windows of text as token ids.

    tokens: each in [0, vocab_size). `tokens[:, :-1]` is read, `tokens[:, 1:]` is predicted.
    """

    tokens: Annotated[Tensor, Field("int64", "B T+1", read=True)]


class DocumentBatch(TypedDict):
    """Pieces of documents, padded to one length.

    tokens: without special tokens.
    token_bytes: bytes of the real text that a token stands for; 0 on padding.
    index: the piece's position in its dataset.
    """

    tokens: Tokens
    mask: Mask
    token_bytes: Mask
    index: Index


class ChatBatch(TypedDict):
    """Conversations, or prompts with their completions, padded to one length.

    mask: the conversation that a token belongs to, from 1 up in each row; 0 on padding. Several may share a row, side
        by side.
    learned: 1 where a token is to be predicted from those before it in its conversation.
    index: the position in its dataset of a row's first conversation.
    """

    tokens: Tokens
    mask: Mask
    learned: Mask
    index: Index


class DenoisingBatch(TypedDict):
    """Corrupted texts and what is missing in them, see `lightspan.datamodules.text.denoising`.

    Several texts may share a row; all that belongs to one has its segment, and its parts stand side by side.

    inputs: texts with a sentinel in place of each hidden span.
    input_segments: the text that a token belongs to, from 1 up in each row; 0 on padding.
    decoder_inputs: targets moved on by one token, behind a token that begins each text.
    targets: sentinels and hidden spans of each text.
    target_segments: as input_segments.
    target_bytes: bytes of the real text that a target token stands for; 0 for all others.
    denoiser: the place in the mixture of what hid this span; 0 on padding.
    index: the position in its dataset of the first text in a row.
    """

    inputs: Tokens
    input_segments: Mask
    decoder_inputs: Targets
    targets: Targets
    target_segments: Targets
    target_bytes: Targets
    denoiser: Targets
    index: Index


class LabelledTextBatch(TypedDict):
    """Tokenized texts, truncated or padded to one length, each with its class."""

    tokens: Tokens
    mask: Mask
    label: Label
    index: Index


class LabelledPairBatch(LabelledTextBatch):
    """A `LabelledTextBatch` with two texts in each row, one behind the other.

    token_types: 1 on the second text where the tokenizer tells them apart, 0 elsewhere.
    """

    token_types: Mask


class PromptBatch(TypedDict):
    """Texts in a prompt, whose label is the next thing to say, see `lightspan.datamodules.text.domains`.

    inputs: the prompt with the text in it.
    input_segments: 1 where a token belongs to it; 0 on padding.
    choices: the words of each label, which are the same for all texts.
    decoder_inputs: choices moved on by one token, behind a token that begins each.
    choice_segments: as input_segments.
    label: each in [0, K).
    target_inputs: of another text, of the target domain, which has no label. Absent where none is to be aligned, as in
        validation.
    index: the labelled text's position in its dataset.
    """

    inputs: Tokens
    input_segments: Mask
    choices: Choices
    decoder_inputs: Choices
    choice_segments: Choices
    label: Label
    target_inputs: NotRequired[Inputs]
    target_input_segments: NotRequired[Inputs]
    index: Index


class TokenPairBatch(TypedDict):
    """Queries and documents: of each query first the one that answers it, then, if P > 1, others that do not.

    tokens: of the query.
    index: the query's position in its dataset.
    """

    tokens: Tokens
    mask: Mask
    document_tokens: Documents
    document_mask: Documents
    index: Index


class ScoredPairBatch(TokenPairBatch):
    """Pairs of texts, P = 1, and how alike they are.

    score: larger for pairs that are more alike, in the unit of the data.
    """

    score: Annotated[Tensor, Field("float32", "B")]


class WholeWordBatch(TypedDict):
    """Tokenized texts, truncated or padded to one length, whose words are known.

    word: counted from 0 the word of the text that a token is part of; -1 for special tokens and padding.
    """

    tokens: Tokens
    mask: Mask
    word: Mask
    index: Index


class SpellingBatch(TypedDict):
    """Words without a picture, each in a sentence.

    characters: 1 + the place of a letter in the alphabet, and 0 behind a word's end.
    tokens: of the sentence.
    index: the word's position in its list.
    """

    characters: Annotated[Tensor, Field("int64", "B L")]
    tokens: Tokens
    mask: Mask
    index: Index
