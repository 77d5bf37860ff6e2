"""Features of all domains after each that an encoder of images and texts learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from lightning import LightningDataModule
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightspan.core.errors import UserError
from lightspan.evaluation.features.class_texts import ClassTexts
from lightspan.evaluation.features.encoded import Encoded
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.input import Input
from lightspan.evaluation.features.store import FeatureStore


@dataclass(frozen=True)
class TextStages:
    """What an encoder makes, after each domain that it learned, of the sentences of all classes and of the test images
    of each domain. Labels count through the classes of all domains.

    Attributes:
        names: of the domains, in the order in which they were learned.
        texts: of the classes of all domains, after each.
        queries: of the test images of each domain, after each.
    """

    names: tuple[str, ...]
    texts: tuple[Features, ...]
    queries: tuple[tuple[Features, ...], ...]


class EncodedStages(Input):
    """What encoders make of the test images of domains, and of one sentence about each of their classes.

    Args:
        encoders: after each domain, in the order in which they were learned, as
            `lightspan.backbones.dual_encoder.DualEncoder`. All of them are in memory.
        domains: their data by name, in the same order, of which test images count, with `class_names`. Pictures in
            folders have the names of these.
        templates: by domain, its sentence, with {} where the class is named.
        tokenizer: how sentences are read; None takes that of the data.
    Raises: UserError for templates of other domains, and as `Encoded` and `ClassTexts`.
    """

    def __init__(
        self,
        encoders: list[nn.Module],
        domains: Mapping[str, LightningDataModule],
        templates: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if domains.keys() != templates.keys():
            raise UserError(
                f"templates are of {[*templates]}, and domains are {[*domains]}; give each domain a sentence"
            )
        self.encoders, self.domains = list(encoders), dict(domains)
        self.templates, self.tokenizer = dict(templates), tokenizer

    def load(self, store: FeatureStore) -> TextStages:
        stages = [self._stage(encoders, store) for encoders in self.encoders]
        return TextStages(tuple(self.domains), tuple(text for text, _ in stages), tuple(query for _, query in stages))

    def outlook(self, store: FeatureStore) -> str:
        return f"features of {len(self.domains)} domains after each of {len(self.encoders)} stages"

    def _stage(self, encoders: nn.Module, store: FeatureStore) -> tuple[Features, tuple[Features, ...]]:
        first, texts, queries = 0, list[Features](), list[Features]()
        for name, data in self.domains.items():
            query = Encoded(encoders, data, "test").load(store)  # sets the data up, which then know their classes
            text = ClassTexts(encoders, data, (self.templates[name],), tokenizer=self.tokenizer).load(store)
            queries.append(replace(query, label_N=query.classes() + first))
            texts.append(replace(text, label_N=text.classes() + first))
            first += len(text)
        return _joined(texts), tuple(queries)


def _joined(parts: Sequence[Features]) -> Features:
    return Features(torch.cat([each.x for each in parts]), torch.cat([each.classes() for each in parts]))
