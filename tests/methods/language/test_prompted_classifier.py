"""Labels that are said: loss and ranking by hand, what is aligned, and two stages that join without a seam."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import method_runs
import pytest
import torch
from lightning import Trainer
from method_cases import prompts
from safetensors.torch import save_model
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from lightspan.backbones.denoisers import EncoderDecoder, PrefixDecoder
from lightspan.backbones.language import llama, stored_t5, t5
from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.weights import with_weights
from lightspan.core.errors import UserError
from lightspan.datamodules.text.domains import DomainDenoising, DomainPrompts
from lightspan.datamodules.text.drawn_reviews import DrawnReviews
from lightspan.methods.language.prompted_classifier import Discrepancy, PromptedClassifier
from lightspan.methods.masked.ul2 import UL2
from lightspan.objectives.mmd import mmd


def method(alignment: Discrepancy | None = None, **settings: Any) -> PromptedClassifier:
    torch.manual_seed(0)
    network = EncoderDecoder(t5(20, 16, 1, heads=2, mlp_width=24))
    return PromptedClassifier(network, 2, alignment, **{"optimizer": partial(torch.optim.SGD, lr=0.1)} | settings)


def logits(model: PromptedClassifier, given: dict[str, Any], row: int, label: int) -> torch.Tensor:
    """[U V] by transformers alone, without padding."""
    network: Any = model.backbone.network
    length, said = int(given["input_segments"][row].sum()), int(given["choice_segments"][row, label].sum())
    ids, read = given["inputs"][row : row + 1, :length], given["decoder_inputs"][row : row + 1, label, :said]
    return network(input_ids=ids, decoder_input_ids=read).logits[0]


def test_the_loss_is_cross_entropy_over_the_tokens_of_the_own_labels_words() -> None:
    model, given = method(), prompts(5, 0)
    nats = []
    for row, label in enumerate(given["label"].tolist()):
        found = logits(model, given, row, label)
        nats.append(F.cross_entropy(found, given["choices"][row, label, : len(found)], reduction="none"))
    torch.testing.assert_close(model.training_step(given, 0), torch.cat(nats).mean())  # type: ignore[arg-type]


def test_labels_are_ranked_by_the_likelihood_of_all_of_their_words() -> None:
    model, given = method(), prompts(5, 0)
    scores = model.predict_step(given, 0)  # type: ignore[arg-type]
    for row in range(5):
        for label in range(2):
            found = logits(model, given, row, label).log_softmax(dim=1)
            words = given["choices"][row, label, : len(found)]
            torch.testing.assert_close(scores[row, label], found.gather(1, words[:, None]).sum(), rtol=1e-4, atol=1e-4)


def test_alignment_adds_the_discrepancy_of_both_domains_and_the_target_says_nothing_else() -> None:
    plain, aligned, given = method(), method(Discrepancy(0.5)), prompts(6, 0)
    source, target = aligned.features(given), aligned.pooled(given["target_inputs"], given["target_input_segments"])  # type: ignore[arg-type]
    expected = plain.training_step(given, 0) + 0.5 * mmd(source, target)  # type: ignore[arg-type]
    torch.testing.assert_close(aligned.training_step(given, 0), expected)  # type: ignore[arg-type]
    source_alone = {name: field for name, field in given.items() if not name.startswith("target")}
    assert torch.equal(plain.training_step(source_alone, 0), plain.training_step(given, 0))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs texts of the target domain"):
        aligned.training_step(source_alone, 0)  # type: ignore[arg-type]


def test_alignment_moves_both_domains_by_kernels_of_its_own_widths() -> None:
    aligned, given = method(Discrepancy(2.0, (0.5,))), prompts(6, 0)
    source, target = aligned.features(given), aligned.pooled(given["target_inputs"], given["target_input_segments"])  # type: ignore[arg-type]
    expected = method().training_step(given, 0) + 2.0 * mmd(source, target, (0.5,))  # type: ignore[arg-type]
    loss = aligned.training_step(given, 0)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, expected)
    table = aligned.backbone.network.shared.weight  # type: ignore[union-attr]
    alone = torch.autograd.grad(method_loss(aligned, given), table)[0]
    both = torch.autograd.grad(loss, table)[0] - alone
    torch.testing.assert_close(
        both, torch.autograd.grad(2.0 * mmd(source, target, (0.5,)), table)[0], atol=1e-6, rtol=1e-4
    )


def method_loss(model: PromptedClassifier, given: dict[str, Any]) -> torch.Tensor:
    """Without what is aligned."""
    held, model.alignment = model.alignment, None
    loss = model.training_step(given, 0)  # type: ignore[arg-type]
    model.alignment = held
    return loss


def test_padding_behind_prompts_and_words_changes_nothing() -> None:
    model, given = method(), prompts(4, 0)
    wider = dict(given)
    for names in (("inputs", "input_segments"), ("choices", "decoder_inputs", "choice_segments")):
        wider |= {name: F.pad(given[name], (0, 3), value=0 if name.endswith("segments") else 7) for name in names}
    torch.testing.assert_close(model.scores(wider), model.scores(given))  # type: ignore[arg-type]
    torch.testing.assert_close(model.features(wider), model.features(given))  # type: ignore[arg-type]


def test_validation_counts_rows_whose_own_label_is_first() -> None:
    model, given = method(), prompts(6, 0)
    given["label"] = model.scores(given).argmax(dim=1)  # type: ignore[arg-type]
    given["label"][0] = 1 - given["label"][0]
    logged: dict[str, Any] = {}
    model.log_dict = lambda figures, **options: logged.update(figures)  # type: ignore[method-assign]
    model.validation_step(given, 0)  # type: ignore[arg-type]
    assert float(logged["val/accuracy"]) == pytest.approx(5 / 6)
    model.test_step(given, 0)  # type: ignore[arg-type]
    expected = F.cross_entropy(model.scores(given), given["label"])  # type: ignore[arg-type]
    torch.testing.assert_close(logged["val/loss_nats"], expected)
    assert logged["test/loss_nats"] == logged["val/loss_nats"]


@pytest.mark.parametrize("steps", [0, 2])
def test_without_a_step_of_the_first_stage_both_are_the_second_alone(steps: int, tmp_path: Path) -> None:
    """To the bit: the first stage hands on weights, and nothing else. With steps it does change them."""
    domains, tokenizer = DrawnReviews(24, 4), HashedWords(64)
    data: dict[str, Any] = {"length": 16, "val_size": 4, "batch_size": 8}

    def network() -> EncoderDecoder:
        torch.manual_seed(3)
        return EncoderDecoder(t5(DomainPrompts(domains, tokenizer, **data).num_tokens, 16, 1, heads=2, mlp_width=24))

    def fitted(model: Any, given: Any, max_steps: int) -> Any:
        trainer = Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_steps=max_steps,
            limit_val_batches=0,
            enable_checkpointing=False,
            **method_runs.SILENT,
        )
        trainer.fit(model, given)
        assert trainer.global_step == max_steps
        return model

    def second(backbone: nn.Module) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        model = PromptedClassifier(backbone, 2, optimizer=partial(torch.optim.AdamW, lr=0.01))
        return fitted(model, DomainPrompts(domains, tokenizer, **data), 3).state_dict()

    first = UL2(network(), optimizer=partial(torch.optim.AdamW, lr=0.01))
    fitted(first, DomainDenoising(domains, tokenizer, **data), steps)
    file = tmp_path / "model.safetensors"
    save_model(first, str(file))  # as `lightspan export --to safetensors` does
    both, alone = second(with_weights(network(), str(file))), second(network())
    equal = [torch.equal(both[name], alone[name]) for name in alone]
    assert all(equal) if steps == 0 else not any(equal)


def test_a_t5_with_a_head_of_its_own_says_in_the_second_stage_what_it_said_in_the_first(tmp_path: Path) -> None:
    folder, file, given = str(tmp_path / "t5"), str(tmp_path / "model.safetensors"), prompts(5, 0)

    def built(tied: bool) -> EncoderDecoder:
        return EncoderDecoder(t5(20, 16, 1, heads=2, mlp_width=24, tied=tied)).eval()

    def stored() -> EncoderDecoder:
        return EncoderDecoder(stored_t5(folder)).eval()

    def said(network: nn.Module) -> torch.Tensor:
        fields = ("inputs", "input_segments", "decoder_inputs", "choice_segments")
        inputs, segments, read, own = (given[name] for name in fields)
        return network(inputs, segments, read[:, 0], own[:, 0])

    torch.manual_seed(0)
    built(tied=False).network.save_pretrained(folder)
    first = UL2(stored(), optimizer=SGD)
    with torch.no_grad():
        for parameter in first.parameters():  # what a stage of training does
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_model(first, file)
    for second in (stored(), built(tied=False)):
        assert torch.equal(said(with_weights(second, file)), said(first.backbone))
    with pytest.raises(UserError, match=r"lm_head\.weight are tied in EncoderDecoder, .*tied=false"):
        with_weights(built(tied=True), file)
    save_model(UL2(built(tied=True), optimizer=SGD), file)
    with pytest.raises(UserError, match=r"lm_head\.weight are tied in .* two tensors in EncoderDecoder"):
        with_weights(built(tied=False), file)  # whose outputs would be sqrt(width) times too large


def test_data_that_do_not_fit_the_network_are_refused() -> None:
    data = DomainPrompts(DrawnReviews(20, 5), HashedWords(64), length=16, val_size=2)  # labels are a word and <eos>
    for context, tokens, said in ((17, 0, "have 18 tokens together"), (18, -1, "set its vocab_size"), (18, 0, None)):
        network = PrefixDecoder(llama(data.num_tokens + tokens, 16, 1, 2, 24, context))
        model = PromptedClassifier(network, 2, optimizer=torch.optim.SGD)
        model.trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
        if said is None:
            model.setup("fit")
        else:
            with pytest.raises(UserError, match=said):
                model.setup("fit")


def test_settings_and_batches_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="num_classes=1"):
        PromptedClassifier(method().backbone, 1, optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match=r"needs a network of lightspan\.backbones\.denoisers"):
        PromptedClassifier(nn.Linear(2, 2), 2, optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="weight=-1"):
        Discrepancy(-1)
    three = PromptedClassifier(method().backbone, 3, optimizer=torch.optim.SGD)
    with pytest.raises(UserError, match="words of 2 labels, and num_classes=3"):
        three.training_step(prompts(3, 0), 0)  # type: ignore[arg-type]
    without = {name: field for name, field in prompts(3, 0).items() if name != "choices"}
    with pytest.raises(UserError, match="this batch has no choices"):
        method().training_step(without, 0)  # type: ignore[arg-type]
