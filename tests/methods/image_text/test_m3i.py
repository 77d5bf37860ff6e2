"""M3I: its terms by hand, what it is with one target, who has a say, the bound, and what is refused."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_cases import partly_labelled
from method_runs import fit
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.vit import vit
from lightspan.core.errors import UserError
from lightspan.methods.image_text.m3i import M3I
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.masking.patch_mix import PatchMix
from lightspan.nn.sequences.patches import at_places, patchify
from lightspan.objectives.info_nce import soft_info_nce
from lightspan.objectives.masked import patch_regression
from lightspan.objectives.moving_targets import MomentumFeatures, Pixels

BATCHES = [partly_labelled(6, seed) for seed in range(3)]
WHOLE = {"mix": PatchMix(1), "dense": 0.0}


def method(
    decoder: MaskDecoder | None = None, classes: int | None = 3, class_token: bool = False, **settings: Any
) -> M3I:
    torch.manual_seed(0)
    backbone = vit(width=16, depth=2, heads=4, img_size=8, patch_size=2, in_chans=1, class_token=class_token)
    encoders = DualEncoder(backbone, TextTransformer(20, 8, 1, 2, 6), width=5)
    categories = None if classes is None else nn.Linear(16, classes)
    given = {"target": MomentumFeatures(0.5), "optimizer": partial(torch.optim.SGD, lr=0.05)}
    return M3I(encoders, decoder or MaskDecoder(16, width=8, depth=1, heads=2), categories, **given | settings)


def batch() -> dict[str, Any]:
    return partly_labelled(6, 1)


def gradient(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_terms_are_those_by_hand_image_by_image(prefix: int) -> None:
    """The class token, if there is one, sees all of a mixture, and the decoder reads it."""
    model, given = method(class_token=bool(prefix)), batch()
    image, losses = given["image"], model.losses(given)
    mixed = model.mix(image, (2, 2), (4, 4), given["index"], 0)
    tokens = model.backbone.tokens(mixed.image_RChw)  # in the order of places, of which the mixtures hide none
    of_all, tokens = tokens[:, :prefix], tokens[:, prefix:]
    target = F.layer_norm(model.target.teacher.module.backbone.tokens(image)[:, prefix:], (16,))
    means, errors = [], []
    for number in range(6):
        source, mixture = divmod(number, 3)
        see, ask = mixed.see_MRK[source][mixture], mixed.ask_MRA[source][mixture]
        own = tokens[mixture, see]
        means.append(own.mean(dim=0))
        seen = torch.cat([of_all[mixture], own])
        guess = model.decoder(seen[None], see[None], ask[None], (4, 4))[0]
        errors.append((guess - target[number, ask]).square().mean())
    torch.testing.assert_close(losses["dense"], torch.stack(errors).mean())
    mean, captioned, labelled = torch.stack(means), torch.tensor([1, 3, 5]), torch.tensor([2, 3])
    expected = F.cross_entropy(model.categories(mean[labelled]), given["label"][labelled])
    torch.testing.assert_close(losses["labels"], expected)
    text = model.encoders.encode_text(given["tokens"], given["mask"])[captioned]
    cosine = F.normalize(model.encoders.image_map(mean[captioned]), dim=1) @ text.T
    torch.testing.assert_close(losses["captions"], F.cross_entropy(cosine / 0.07, torch.arange(3)))
    whole = model.backbone.tokens(image)[:, prefix:].mean(dim=1)
    torch.testing.assert_close(model.features(given), whole)


def test_one_whole_image_with_its_label_is_a_softmax_of_a_linear_head() -> None:
    model, given = method(captions=0.0, **WHOLE), batch()
    del given["label_known"]
    logits = model.categories(model.features(given))
    torch.testing.assert_close(model.training_step(given, 0), F.cross_entropy(logits, given["label"]))


def test_one_whole_image_with_its_caption_is_clip_from_image_to_text() -> None:
    model, given = method(labels=0.0, **WHOLE), batch()
    del given["caption_known"]
    image = F.normalize(model.encoders.image_map(model.features(given)), dim=1)
    logits = model.encoders.scale * image @ model.encoders.encode_text(given["tokens"], given["mask"]).T
    torch.testing.assert_close(model.training_step(given, 0), F.cross_entropy(logits, torch.arange(6)))
    torch.testing.assert_close(model.embeddings(given), image)


@pytest.mark.parametrize("normalise", [True, False])
def test_one_image_with_hidden_pixels_is_a_masked_autoencoder(normalise: bool) -> None:
    model = method(None, None, target=Pixels(normalise), mix=PatchMix(1, hidden=0.75), captions=0.0)
    given, image = batch(), batch()["image"]
    mixed = model.mix(image, (2, 2), (4, 4), given["index"], 0)
    see, hide = mixed.see_MRK[0], mixed.ask_MRA[0]
    assert see.shape == (6, 4)
    guess = model.decoder(model.backbone.tokens(image, keep_BK=see), see, hide, (4, 4))
    expected = patch_regression(guess, at_places(patchify(image, (2, 2)), hide), normalise)
    torch.testing.assert_close(model.training_step(given, 0), expected)


def test_the_whole_is_the_weighted_sum_and_its_gradient_too() -> None:
    weights = {"dense": 0.5, "captions": 2.0, "labels": 1.5}
    model, given = method(**weights), batch()
    losses = model.losses(given)
    torch.testing.assert_close(
        model.training_step(given, 0), torch.stack([weights[n] * each for n, each in losses.items()]).sum()
    )
    found, parts = gradient(model.training_step(given, 0), model), {n: gradient(x, model) for n, x in losses.items()}
    for name, each in found.items():
        expected = sum(weights[term] * of[name] for term, of in parts.items())
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-6)
    for term, of in parts.items():
        assert any(of[name].any() for name in of if name.startswith("encoders.image.")), term


def test_what_a_sample_lacks_has_no_gradient() -> None:
    model, given = method(**WHOLE), batch()
    given["image"].requires_grad_()
    losses = model.losses(given)
    for term, known in (("captions", "caption_known"), ("labels", "label_known")):
        (grad,) = torch.autograd.grad(losses[term], given["image"], retain_graph=True)
        assert torch.equal(grad.abs().sum(dim=(1, 2, 3)) > 0, given[known] == 1)
    said = given | {"label": torch.where(given["label_known"] == 1, given["label"], (given["label"] + 1) % 3)}
    said["tokens"] = torch.where(given["caption_known"][:, None] == 1, given["tokens"], 7)
    changed = model.losses(said)
    assert all(torch.equal(changed[term], losses[term]) for term in ("captions", "labels"))
    nothing = given | {"caption_known": torch.zeros(6), "label_known": torch.zeros(6)}
    assert all(model.losses(nothing)[term] == 0 for term in ("captions", "labels"))


def test_an_image_that_fills_up_a_mixture_counts_once() -> None:
    model, given = method(), {name: field[:5] for name, field in batch().items()}
    mixed = model.mix(given["image"], (2, 2), (4, 4), given["index"], 0)
    assert mixed.rows_MR.tolist() == [[0, 1, 2], [3, 4, 0]]
    means = [part.mean(dim=1) for part in mixed.sources(model.backbone.tokens(mixed.image_RChw, keep_BK=mixed.see_RS))]
    logits = model.categories(torch.cat(means)[:5])
    known = given["label_known"] == 1
    torch.testing.assert_close(model.losses(given)["labels"], F.cross_entropy(logits[known], given["label"][known]))


def test_the_teacher_follows_gets_no_gradient_and_the_scale_is_held(tmp_path: Path) -> None:
    model = method(target=MomentumFeatures(0.5, 0.5), most_scale=10.0)
    teacher = [p.clone() for p in model.target.teacher.parameters()]
    fit(model, BATCHES[:1], tmp_path)
    for mean, before, now in zip(model.target.teacher.parameters(), teacher, model.backbone.parameters(), strict=True):
        torch.testing.assert_close(mean, (before + now) / 2)
        assert mean.grad is None
    assert float(model.encoders.scale.detach()) == pytest.approx(10.0)


def test_log_n_minus_the_loss_is_a_bound_of_the_information_of_gaussians() -> None:
    """With the true density ratio, of 256 pairs with correlation 0.9: I = -log(1 - 0.81) / 2."""
    generator = torch.Generator().manual_seed(0)
    rho, found = 0.9, []
    for _ in range(40):
        x, noise = torch.randn(2, 256, generator=generator, dtype=torch.float64)
        y = rho * x + math.sqrt(1 - rho**2) * noise
        logits = -(y[None, :] - rho * x[:, None]).square() / (2 * (1 - rho**2)) + y.square() / 2
        loss = soft_info_nce(logits, torch.eye(256, dtype=torch.float64))
        assert loss >= 0  # so that the bound is at most log N
        found.append(math.log(256) - float(loss))
    information = -math.log(1 - rho**2) / 2
    assert information - 0.1 < sum(found) / len(found) < information


def test_what_does_not_fit_is_refused() -> None:
    given = batch()
    uncaptioned = {name: field for name, field in given.items() if name not in ("tokens", "mask")}
    with pytest.raises(UserError, match=r"M3I needs captions, as tokens and mask, and this batch has none \(it holds"):
        method().training_step(uncaptioned, 0)
    with pytest.raises(UserError, match="M3I needs a whole number for each sample as label"):
        method().training_step({name: field for name, field in given.items() if name != "label"}, 0)
    with pytest.raises(UserError, match=r"label_known of this batch is \[2\]; it must be one 0 or 1"):
        method().training_step(given | {"label_known": torch.ones(2)}, 0)
    with pytest.raises(UserError, match="one image without hidden places shows all; set mix"):
        method(mix=PatchMix(1))
    with pytest.raises(UserError, match=r"decoder\.out_features=8, and MomentumFeatures has 16 numbers for each patch"):
        method(MaskDecoder(16, 8, width=8, depth=1, heads=2))
    with pytest.raises(UserError, match=r"decoder\.in_features=9, but TokenViT gives 16 features"):
        method(MaskDecoder(9, width=8, depth=1, heads=2))
    with pytest.raises(UserError, match="captions=-1 must be at least 0"):
        method(captions=-1)
    with pytest.raises(UserError, match=r"most_scale=0\.5 must be at least 1"):
        method(most_scale=0.5)
    with pytest.raises(UserError, match="of 16 patches 1 are seen, too few for sources=2"):
        method(mix=PatchMix(2, hidden=0.9)).training_step(given, 0)
