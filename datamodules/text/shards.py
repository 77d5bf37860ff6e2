"""Documents from WebDataset tar shards, such as C4's, tokenised as they are read."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.core.files.places import ReadPath
from lightspan.datamodules.shards.decoders import decode_fields, place_of
from lightspan.datamodules.shards.stand_ins import NOWHERE
from lightspan.datamodules.shards.stream import Decoding, Shards
from lightspan.datamodules.text.documents import FIELD, encoded, numbers_of
from lightspan.datamodules.text.forms import Padded, TextForm, joined_in_training, window

LEFT_OUT = "data.init_args.skip_damaged=true takes another document in its place"


@dataclass(frozen=True)
class TextDecoding(Decoding):
    """A document, or a part of it that is drawn from the seed, in the form that the batch wants."""

    tokenizer: PreTrainedTokenizerBase | None
    form: TextForm

    @property
    def batch_type(self) -> type | None:
        return self.form.batch_type

    def __call__(self, members: dict[str, Any], seed: int) -> dict[str, Any]:
        text = decode_fields(members, self.fields)[FIELD]
        text = text.get(FIELD) if isinstance(text, dict) else text
        if not isinstance(text, str):
            raise UserError(f'{place_of(members)} has no text; its .json member must be {{"{FIELD}": "..."}}')
        document = encoded(text.encode("utf-8", "replace"), self.tokenizer)
        if len(document.tokens) < self.form.shortest:
            raise UserError(
                f"{place_of(members)} has {len(document.tokens)} tokens, and a document needs {self.form.shortest}; "
                f"{LEFT_OUT}"
            )
        return self.form(window(document, self.form.longest, seed), seed)


class TextShards(Shards):
    """Batches are those of `form`, from members KEY.txt, or KEY.json with a field `text`. Order, resume, damage and
    memory are those of `Shards`: each document once in each epoch, on any number of ranks and workers.

    A document gives one row. Of one that is longer, another part is seen in each epoch. An empty document stops the
    run, or with `skip_damaged` another takes its place; `lightspan data pack --text` leaves empty ones out.

    Args:
        shards, val_shards: as in `Shards`.
        tokenizer: turns a text into tokens; None uses its bytes (UTF-8).
        form: makes the fields of a batch; None pads to 256 tokens, `DocumentBatch`.
        settings: `batch_size`, `window`, `seed`, `num_workers`, `skip_damaged` and the others of `Shards` that are not
            of images.

    Attributes:
        num_tokens: numbers of tokens, from 0 up, with those that `form` adds.
    """

    def __init__(
        self,
        shards: list[ReadPath],
        val_shards: list[ReadPath] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        form: TextForm | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(shards, val_shards, fields={FIELD: "txt|json"}, image_size=None, **settings)
        self.form = form or Padded()
        self.num_tokens = self.form.prepare(*numbers_of(tokenizer))
        self.decode = TextDecoding(**vars(self.decode), tokenizer=tokenizer, form=self.form)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lets `form` join the rows of a batch to train on."""
        return joined_in_training(self, self.form.joined, batch)

    def example(self) -> dict[str, Any]:
        """A document that fills a row."""
        return self.decode(NOWHERE | {"txt": b"to be or not to be " * self.form.longest}, seed=0)
