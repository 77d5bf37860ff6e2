"""WordReader: its loss is that of its decoder on merged patches, and what it reads."""

from functools import partial
from typing import Any

import pytest
import torch

from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.supervised.word_reader import WordReader
from lightspan.nn.decoders.letter_decoder import LetterDecoder, LetterOrders
from lightspan.nn.heads.attention_pool import FeatureMerge
from lightspan.objectives.letters import permuted_letter_loss


def method(optimizer: Any = torch.optim.SGD, merged: bool = True, **settings: Any) -> WordReader:
    torch.manual_seed(0)
    backbone = vit(16, 1, 2, img_size=8, patch_size=2, in_chans=1, class_token=False)
    decoder = LetterDecoder(letters=3, length=2, width=16, depth=1, heads=2, dropout=0.0)
    merge = FeatureMerge(16, queries=3, heads=2, dropout=0.0) if merged else None
    return WordReader(backbone, decoder, merge, **{"optimizer": partial(optimizer, lr=0.1)} | settings)


def batch(rows: int = 6, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, 1, 8, 8, generator=generator)
    characters = torch.randint(1, 4, (rows, 2), generator=generator)
    return {"image": image, "characters": characters, "index": torch.arange(rows) + 10 * seed}


@pytest.mark.parametrize("merged", [True, False])
def test_the_loss_is_the_decoders_on_what_is_merged_of_all_patches(merged: bool) -> None:
    model, given = method(merged=merged), batch()
    patches = model.backbone.tokens(given["image"])  # type: ignore[operator]
    memory = model.merge(patches) if model.merge is not None else patches
    assert memory.shape == (6, 3 if merged else 16, 16)
    logits = model.decoder.in_orders(memory, given["characters"], LetterOrders(), 0)
    torch.testing.assert_close(model.training_step(given, 0), permuted_letter_loss(logits, given["characters"]))
    assert torch.equal(model.features(given), model.backbone(given["image"]))


def test_every_weight_is_trained() -> None:
    model = method()
    model.training_step(batch(), 0).backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert still == {"backbone.network.pos_embed"}


def test_a_word_is_read_from_the_memory_of_its_picture() -> None:
    model, given = method().eval(), batch()
    read = model(given["image"])
    assert torch.equal(read, model.decoder.read(model.memories(given["image"])))
    assert read.shape == (6, 2)
    assert torch.equal(model(given["image"][:1]), read[:1])


def test_what_does_not_fit_is_refused() -> None:
    backbone, decoder = method().backbone, method().decoder
    with pytest.raises(UserError, match=r"merge\.width=8, but TokenViT gives 16"):
        WordReader(backbone, decoder, FeatureMerge(8, 3, 2), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"decoder\.width=8, but TokenViT gives 16"):
        WordReader(backbone, LetterDecoder(width=8), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="WordReader's decoder is a LetterDecoder, not Linear"):
        WordReader(backbone, torch.nn.Linear(2, 2), optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="WordReader needs a backbone with tokens"):
        WordReader(torch.nn.Linear(2, 2), decoder, optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="of up to 3 letters are longer"):
        method()._on_before_batch_transfer(batch() | {"characters": torch.ones(6, 3).long()})
