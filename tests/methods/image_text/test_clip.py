"""CLIP: the loss against its definition, chunks against the whole batch, two ranks against one, and the clamp."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.vision import MLP
from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import resolve
from lightspan.core.distributed import end_process_group
from lightspan.core.errors import UserError
from lightspan.methods.image_text.clip import CLIP, clip_loss
from lightspan.nn.grad_cache import in_chunks

ROWS, RANKS = 7, 2


def method(**settings: Any) -> CLIP:
    torch.manual_seed(0)
    encoders = DualEncoder(MLP((1, 4, 4), (12,)), TextTransformer(20, 8, 2, 2, 6), width=5)
    built = CLIP(encoders, **settings, optimizer=partial(torch.optim.SGD, lr=0.1)).double()
    built.log_training = lambda figures, **options: None  # type: ignore[method-assign]
    return built


def batch(rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    length = torch.randint(1, 7, (rows, 1), generator=generator)
    return {
        "image": torch.randn(rows, 1, 4, 4, dtype=torch.float64, generator=generator),
        "tokens": torch.randint(20, (rows, 6), generator=generator),
        "mask": (torch.arange(6) < length).long(),
        "index": torch.arange(rows),
    }


def embeddings(rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    image, text = (F.normalize(torch.randn(rows, 4, dtype=torch.float64, generator=generator)) for _ in range(2))
    return image, text


def test_the_loss_is_that_of_a_double_loop() -> None:
    image, text = embeddings()
    s = [[float(a @ b) / 0.07 for b in text] for a in image]
    total = 0.0
    for i in range(6):
        total += math.log(sum(math.exp(s[i][j]) for j in range(6))) - s[i][i]
        total += math.log(sum(math.exp(s[j][i]) for j in range(6))) - s[i][i]
    assert clip_loss(image, text, 0.07).item() == pytest.approx(total / 12, rel=1e-12)


def test_equal_rows_give_log_n_and_one_pair_nothing() -> None:
    rows = torch.ones(6, 4, dtype=torch.float64)
    assert clip_loss(rows, rows, 0.07).item() == pytest.approx(math.log(6), rel=1e-12)
    assert clip_loss(rows[:1], rows[:1], 0.07).item() == 0


def test_the_loss_is_unchanged_when_sides_swap_or_pairs_permute() -> None:
    image, text = embeddings()
    order, loss = torch.randperm(6), clip_loss(image, text, 0.1)
    torch.testing.assert_close(clip_loss(text, image, 0.1), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(clip_loss(image[order], text[order], 0.1), loss, rtol=1e-12, atol=0)
    assert clip_loss(image, text.roll(1, dims=0), 0.1) != loss


def gradients(model: CLIP, given: dict[str, Tensor]) -> dict[str, Tensor]:
    model.training_step(given, 0).backward()  # type: ignore[arg-type]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_chunks_give_the_gradient_of_the_whole_batch(chunk: int) -> None:
    whole, parts = gradients(method(), batch()), gradients(method(chunk=chunk), batch())
    assert whole.keys() == parts.keys() == dict(method().named_parameters()).keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=1e-13, msg=name)


def test_a_chunk_is_encoded_twice_with_the_same_random_numbers() -> None:
    seen: list[Tensor] = []

    def noisy(x: Tensor) -> Tensor:
        seen.append(torch.rand(()))
        return x.sin()  # whose backward needs x

    in_chunks(noisy, 2, torch.ones(4, 1, requires_grad=True)).sum().backward()
    assert len(seen) == 4
    assert sorted(seen[:2]) == sorted(seen[2:])


def one_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=RANKS)
    part = slice(0, 5) if index == 0 else slice(5, ROWS)
    model = method(chunk=2)
    loss = model.training_step({name: x[part] for name, x in batch().items()}, 0)  # type: ignore[arg-type]
    loss.backward()
    found = {name: p.grad / RANKS for name, p in model.named_parameters() if p.grad is not None}
    for gradient in found.values():
        dist.all_reduce(gradient)
    torch.save(found | {"loss": loss.detach()}, Path(folder, f"{index}.pt"))
    end_process_group()


@pytest.mark.ranks
def test_two_ranks_of_unequal_batches_give_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    rank_processes.start(one_rank, RANKS, str(tmp_path))
    model = method()
    expected = gradients(model, batch()) | {"loss": model.training_step(batch(), 0).detach()}  # type: ignore[arg-type]
    for index in range(RANKS):
        found = torch.load(tmp_path / f"{index}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize(("start", "end"), [(9.0, math.log(100)), (-2.0, 0.0), (1.5, 1.5)])
def test_the_scale_never_leaves_its_range_after_a_step(start: float, end: float) -> None:
    model = method()
    with torch.no_grad():
        model.encoders.log_scale.fill_(start)
        model.after_optimizer_step()
    assert model.encoders.log_scale.item() == pytest.approx(end)
    assert model.encoders.scale.item() <= 100 * (1 + 1e-12)


def test_the_temperature_has_no_decay_and_is_trained() -> None:
    model = method()
    (vectors,) = [group for group in model.groups.build(model) if group["name"] == "vectors"]
    assert vectors["weight_decay"] == 0
    assert any(p is model.encoders.log_scale for _, p in vectors["params"])
    assert gradients(model, batch())["encoders.log_scale"] != 0


def test_probes_read_the_image_encoder() -> None:
    model, given = method(), batch()
    assert torch.equal(model.features(given), model.encoders.image(given["image"]))
    assert model.token_features(given)[0].tokens_BTD.shape == (ROWS, 1, 12)


def test_what_it_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"most_scale=0.5 must"):
        method(most_scale=0.5)
    with pytest.raises(UserError, match=r"chunk=0 must be at least 1"):
        method(chunk=0)
    with pytest.raises(UserError, match=r"Identity or Identity has no num_features"):
        DualEncoder(torch.nn.Identity(), torch.nn.Identity())
    with pytest.raises(UserError, match=r"width=0 must be at least 1, and temperature=0.07 above 0"):
        DualEncoder(MLP((1, 4, 4), (12,)), TextTransformer(20, 8, 1, 2, 6), width=0)


def test_recipes_read_texts_that_their_encoder_has_positions_and_numbers_for() -> None:
    for name in ("clip_scenes", "clip_stamps"):
        built = build(resolve(f"image_text/{name}"))
        assert isinstance(built.model, CLIP)
        text, data = built.model.encoders.text, built.datamodule
        assert text.context >= data.length
        assert text.tokens.num_embeddings == data.tokenizer.vocab_size
