"""PLLaVA: against LLaVA of transformers, what pooling is, which tokens are learned, and LoRAs at another scale."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lightspan.adapters.inject import adapt, disable_adapters, fold
from lightspan.adapters.lora import LoRA, rescale
from lightspan.adapters.peft import load_peft, save_peft
from lightspan.adapters.state import load_adapter, save_adapter
from lightspan.backbones.image_language import ImageLanguage, stored_llava
from lightspan.backbones.language import llama
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.image_text.pllava import PLLaVA, pool_clip
from lightspan.nn.heads.mlp_head import MLPHead

SGD = partial(torch.optim.SGD, lr=0.1)
VIDEO = 29
"""The number that LLaVA of transformers keeps for the tokens of images."""
SMALL_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


@pytest.fixture(scope="module")
def reference() -> LlavaForConditionalGeneration:
    """LLaVA with 4 x 4 patches of an image and a language model of 30 tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SMALL_VISION)
    text = LlamaConfig(
        vocab_size=30,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=VIDEO)
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(reference: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    reference.save_pretrained(place := tmp_path_factory.mktemp("llava"))
    return place


def method(folder: Path, pooled: tuple[int, int, int], **settings: Any) -> PLLaVA:
    return PLLaVA(stored_llava(str(folder), "float32"), pooled, **{"optimizer": SGD} | settings).eval()


def batch(rows: int = 3, frames: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Texts of several lengths, with clips at several places, and answers of one to three tokens at their end."""
    generator = torch.Generator().manual_seed(seed)
    at, length, answer = (torch.tensor(given)[:rows] for given in ([0, 2, 4], [8, 5, 7], [3, 1, 2]))
    place = torch.arange(8)
    mask = place < length[:, None]
    return {
        "clip": torch.randn(rows, 3, frames, 16, 16, generator=generator),
        "fps": torch.full((rows,), 25.0),
        "tokens": torch.randint(1, VIDEO, (rows, 8), generator=generator) * mask,
        "mask": mask.long(),
        "learned": (mask & (place >= (length - answer)[:, None])).long(),
        "clip_at": at,
        "index": torch.arange(rows),
    }


def of_frames(reference: LlavaForConditionalGeneration, given: dict[str, Tensor], row: int) -> Tensor:
    """Logits of LLaVA on a row whose frames are so many images, [L V]: entry j is of token j."""
    frames, at = given["clip"][row].transpose(0, 1), int(given["clip_at"][row])
    length = int(given["mask"][row].sum())
    tokens, count = given["tokens"][row, :length], 16 * len(frames)
    ids = torch.cat([tokens[:at], torch.full((count,), VIDEO), tokens[at:]])[None]
    logits = reference(input_ids=ids, pixel_values=frames).logits[0]
    return logits[count - 1 : -1] if at == 0 else torch.cat([logits[:at], logits[count + at - 1 : -1]])


def test_pooled_to_its_own_shape_a_clip_is_to_llava_so_many_images(
    reference: LlavaForConditionalGeneration, folder: Path
) -> None:
    model, given = method(folder, (4, 4, 4)), batch()
    with torch.no_grad():
        found = model.logits(given)
        for row, at in enumerate(given["clip_at"].tolist()):
            expected = of_frames(reference, given, row)
            torch.testing.assert_close(found[row, at : len(expected)], expected[at:], atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_the_answers_alone(reference: LlavaForConditionalGeneration, folder: Path) -> None:
    model, given = method(folder, (4, 4, 4)), batch()
    model.log_training = lambda figures, **_: None  # type: ignore[method-assign]
    nats = []
    with torch.no_grad():
        for row, count in enumerate((3, 1, 2)):
            logits = of_frames(reference, given, row)
            said = given["tokens"][row, : len(logits)]
            nats.append(F.cross_entropy(logits[-count:], said[-count:], reduction="none"))
        expected = torch.cat(nats).mean()
        torch.testing.assert_close(model.training_step(given, 0), expected)
        padded = given["tokens"] + 5 * (1 - given["mask"])
        torch.testing.assert_close(model.training_step(given | {"tokens": padded}, 0), expected)
        before = torch.arange(8) < given["clip_at"][:, None]  # which cannot be learned from the clip
        torch.testing.assert_close(model.training_step(given | {"learned": given["learned"] | before}, 0), expected)


def test_pooling_is_the_mean_of_each_window() -> None:
    x = torch.randn(2, 4, 6, 5, 3, dtype=torch.float64)
    assert torch.equal(pool_clip(x, (4, 6, 5)), x.flatten(1, 3))
    blocks = x.unflatten(2, (3, 2)).unflatten(1, (2, 2)).mean(dim=(2, 4, 5))
    torch.testing.assert_close(pool_clip(x, (2, 3, 1)), blocks.flatten(1, 2))
    windows = [x[:, :, :, begin:end].mean(dim=3) for begin, end in ((0, 2), (1, 4), (3, 5))]  # of five by three
    torch.testing.assert_close(pool_clip(x, (4, 6, 3)), torch.stack(windows, dim=3).flatten(1, 3))
    half = x.to(torch.bfloat16)
    torch.testing.assert_close(
        pool_clip(half, (1, 1, 1)), half.double().mean(dim=(1, 2, 3))[:, None].to(torch.bfloat16)
    )
    for shape in ((5, 6, 5), (4, 7, 5), (4, 6, 6)):
        with pytest.raises(UserError, match="pooled"):
            pool_clip(x, shape)


def test_equal_frames_pool_to_one_frame() -> None:
    frame = torch.randn(2, 1, 4, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(pool_clip(frame.expand(2, 5, 4, 4, 3), (1, 2, 2)), pool_clip(frame, (1, 2, 2)))


def test_pooling_commutes_with_the_last_layer_of_the_projector_and_not_with_its_gelu() -> None:
    torch.manual_seed(0)
    x, projector = torch.randn(2, 4, 4, 4, 6, dtype=torch.float64), MLPHead(6, 5, [7]).double()
    last = projector.layers[2]
    pooled = pool_clip(projector(x), (2, 2, 2))
    torch.testing.assert_close(last(pool_clip(projector.layers[:2](x), (2, 2, 2))), pooled)
    assert (projector(pool_clip(x, (2, 2, 2))) - pooled).abs().max() > 0.01


def test_the_language_model_reads_so_many_tokens_of_a_clip_before_the_rest_of_the_text(folder: Path) -> None:
    model, given = method(folder, (2, 2, 1)), batch()
    shown = model.shown(given)
    assert shown.shape == (3, model.clip_tokens, 24) == (3, 4, 24)
    rows, words = (
        model.network.spliced(shown, given["tokens"], given["clip_at"]),
        model.network.language.get_input_embeddings(),
    )
    for row, at in enumerate(given["clip_at"].tolist()):
        text = words(given["tokens"][row])
        assert torch.equal(rows[row], torch.cat([text[:at], shown[row], text[at:]]))
    assert model.features(given).shape == (3, 16)


def test_encoder_and_its_dropout_do_not_train(folder: Path) -> None:
    model = method(folder, (1, 1, 1)).train()
    model.log_training = lambda figures, **_: None  # type: ignore[method-assign]
    model.training_step(batch(), 0).backward()
    assert not model.backbone.training
    assert all(not p.requires_grad for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.network.projector.parameters())


def adapted(folder: Path, **settings: Any) -> PLLaVA:
    """As after training: a LoRA that is not zero."""
    model = method(folder, (2, 2, 2), **settings)
    adapt(model, LORAS, LoRA(4, alpha=8.0), train=["network.projector.*"], show=False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
            assert "up_OR" in name or "down_RI" in name or "projector" in name
    return model


LORAS = ["network.language.*.q_proj", "network.language.*.v_proj"]


@torch.no_grad()
def test_alpha_goes_from_the_image_model_to_the_tuned_one(folder: Path) -> None:
    model, given = adapted(folder), batch()
    tuned = model.logits(given)
    with disable_adapters(model):
        image = model.logits(given)
    rescale(model, 0.0)
    assert torch.equal(model.logits(given), image)
    rescale(model, 8.0)
    assert torch.equal(model.logits(given), tuned)
    rescale(model, 2.0)
    between = model.logits(given)
    assert min((between - image).abs().max(), (between - tuned).abs().max()) > 0.01
    fold(model)
    torch.testing.assert_close(model.logits(given), between, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_alpha_is_that_of_validation_and_prediction_and_not_of_training(folder: Path) -> None:
    logged: dict[str, Any] = {}
    plain, mixed, given = adapted(folder), adapted(folder, alpha=0.0), batch()
    for model in (plain, mixed):
        model.log = lambda name, value, **_: logged.__setitem__(name, value)  # type: ignore[method-assign]
        model.log_training = lambda figures, **_: None  # type: ignore[method-assign]
    torch.testing.assert_close(plain.training_step(given, 0), mixed.training_step(given, 0))
    plain.validation_step(given, 0)
    tuned = logged["val/loss_nats"]
    torch.testing.assert_close(tuned, plain.training_step(given, 0))
    mixed.validation_step(given, 0)
    with disable_adapters(plain):
        torch.testing.assert_close(logged["val/loss_nats"], plain.training_step(given, 0))
    assert logged["val/loss_nats"] != tuned
    with pytest.raises(UserError, match="alpha"):
        method(folder, (2, 2, 2), alpha=4.0).validation_step(given, 0)


@torch.no_grad()
def test_answers_are_the_most_likely_tokens_one_by_one(reference: LlavaForConditionalGeneration, folder: Path) -> None:
    model, given = method(folder, (4, 4, 4), longest=4), batch()
    found = model.generate(given)
    assert found.shape == (3, 4)
    for row, (count, answer) in enumerate(zip((8, 5, 7), (3, 1, 2), strict=True)):
        own = {name: field[row : row + 1] for name, field in given.items()}
        said = own["tokens"][:, : count - answer]
        for token in found[row].tolist():
            longer = own | {"tokens": F.pad(said, (0, 1)), "mask": torch.ones(1, said.shape[1] + 1)}
            assert int(of_frames(reference, longer, 0)[-1].argmax()) == token
            said = torch.cat([said, torch.tensor([[token]])], dim=1)
    ended = method(folder, (4, 4, 4), longest=4, end=int(found[0, 0])).predict_step(given, 0)
    assert ended[0].tolist() == [int(found[0, 0])] + [0] * (ended.shape[1] - 1)


@torch.no_grad()
def test_answers_that_count_as_right_are_those_that_would_be_given(folder: Path) -> None:
    model, given, logged = method(folder, (2, 2, 2), longest=3), batch(), dict[str, Any]()
    said = model.generate(given)
    learned = given["learned"].bool()
    told = given["tokens"].clone()
    for row in (0, 2):
        told[row, learned[row]] = said[row, : int(learned[row].sum())]
    told[1, learned[1]] = (said[1, 0] + 1) % VIDEO
    model.log = lambda name, value, **_: logged.__setitem__(name, value)  # type: ignore[method-assign]
    model.test_step(given | {"tokens": told}, 0)
    torch.testing.assert_close(logged["test/answers_right"], torch.tensor(2 / 3))


@torch.no_grad()
def test_a_file_brings_back_loras_projector_and_scale_and_refuses_other_base_weights(
    folder: Path, tmp_path: Path
) -> None:
    model, given = adapted(folder), batch()
    save_peft(model, tmp_path / "peft")
    loaded = method(folder, (2, 2, 2))
    load_peft(loaded, tmp_path / "peft", show=False)
    torch.testing.assert_close(loaded.logits(given), model.logits(given))
    rescale(model, 2.0)
    save_adapter(model, tmp_path / "lora.safetensors")
    again = method(folder, (2, 2, 2))
    load_adapter(again, tmp_path / "lora.safetensors", show=False)
    assert torch.equal(again.logits(given), model.logits(given))
    other = method(folder, (2, 2, 2))
    for parameter in other.network.language.parameters():
        parameter.data += 0.01
    with pytest.raises(UserError, match="other weights"):
        load_adapter(other, tmp_path / "lora.safetensors", show=False)


@torch.no_grad()
def test_weights_under_the_names_of_the_published_files_are_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    assert {name.split(".")[0] for name in older} == {"language_model", "vision_tower", "multi_modal_projector"}
    save_file(older, tmp_path / "model.safetensors")
    given = batch()
    assert torch.equal(method(tmp_path, (2, 2, 2)).logits(given), method(folder, (2, 2, 2)).logits(given))


def test_in_half_precision_the_projector_alone_is_wide_and_the_loss_is_near(folder: Path) -> None:
    network, given = stored_llava(str(folder)), batch()
    assert {p.dtype for p in network.projector.parameters()} == {torch.float32}
    assert {p.dtype for part in (network.image, network.language) for p in part.parameters()} == {torch.bfloat16}
    losses = []
    for model in (PLLaVA(network, (2, 2, 2), optimizer=SGD), method(folder, (2, 2, 2))):
        model.log_training = lambda figures, **_: None  # type: ignore[method-assign]
        losses.append(model.eval().training_step(given, 0))
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.projector.parameters())
    torch.testing.assert_close(*losses, atol=0.05, rtol=0)


def test_a_folder_without_some_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "part"
    place.mkdir()
    (place / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    lacking = next(name for name in tensors if "q_proj" in name and "language" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lacking}, place / "model.safetensors")
    with pytest.raises(UserError, match="lack 1 weights"):
        stored_llava(str(place))
    for content in (b"no JSON", b"[]"):
        (place / "config.json").write_bytes(content)
        with pytest.raises(UserError, match="LLaVA"):
            stored_llava(str(place))


def test_bad_input_is_refused(folder: Path, tmp_path: Path) -> None:
    model, given = method(folder, (2, 2, 2)), batch()
    with pytest.raises(UserError, match="pooled"):
        method(folder, (0, 2, 2))
    with pytest.raises(UserError, match="pooled"):
        method(folder, (8, 2, 2)).logits(given)  # more than its frames
    for changed in ({"clip_at": torch.tensor([0, 2, 9])}, {"clip_at": torch.tensor([0.0, 1.0, 2.0])}):
        with pytest.raises(UserError, match="clip_at"):
            model.logits(given | changed)
    with pytest.raises(UserError, match="clip_at"):
        model.logits({name: field for name, field in given.items() if name != "clip_at"})
    with pytest.raises(UserError, match="clips"):
        model.logits(given | {"clip": given["clip"][:, :, 0]})
    with pytest.raises(UserError, match="alpha"):
        method(folder, (2, 2, 2), alpha=-1.0)


def test_texts_and_clip_have_to_fit_the_positions_of_the_language_model(folder: Path) -> None:
    model = method(folder, (4, 4, 4))
    for length, fits in ((192, True), (193, False)):
        model._trainer = SimpleNamespace(datamodule=SimpleNamespace(length=length))  # type: ignore[assignment]
        with nullcontext() if fits else pytest.raises(UserError, match="positions"):
            model.setup("validate")


def test_parts_that_do_not_fit_are_refused() -> None:
    encoder, words = vit(16, 1, 2, img_size=8, patch_size=4, in_chans=1), llama(20, 24, 1, 2, 24, 40)
    images = torch.randn(2, 1, 8, 8)
    assert ImageLanguage(encoder, MLPHead(16, hidden=[8]), words, -1).grid(images).shape == (2, 2, 2, 16)
    with pytest.raises(UserError, match="out_features"):
        ImageLanguage(encoder, MLPHead(16, 23), words)
    with pytest.raises(UserError, match="in_features"):
        ImageLanguage(encoder, MLPHead(15), words, -1).grid(images)
    with pytest.raises(UserError, match="language"):
        ImageLanguage(encoder, MLPHead(16), nn.Linear(3, 3))  # type: ignore[arg-type]
    network = transformers.CLIPVisionModel(CLIPVisionConfig(**SMALL_VISION))
    with pytest.raises(UserError, match="prefix"):
        ImageLanguage(network, MLPHead(16), words, -1).grid(torch.randn(2, 3, 16, 16))
