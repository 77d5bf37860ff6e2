"""SPT: nothing hidden leaks, losses by hand, the network of stage 2 is that of stage 1, and its data are the same."""

import contextlib
import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_runs import fit
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.backbones.sequence import SequenceNetwork, sequence_state_space, sequence_transformer
from lightspan.backbones.vision import MLP
from lightspan.backbones.weights import with_weights
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.sequence.pixels import PixelSequences
from lightspan.methods.masked.spt import SPT, LevelGuess, MaskedSteps, NextValue, StepGuess, SymbolGuess, ValueGuess
from lightspan.methods.supervised.sequence_classifier import SequenceClassifier
from lightspan.nn.masking.step_masks import StepMasks

SGD = {"optimizer": partial(torch.optim.SGD, lr=0.1)}
KINDS = ("transformer", "rotary", "state space")


def network(kind: str, **settings: Any) -> SequenceNetwork:
    sizes = {"width": 8, "depth": 2, **settings}
    if kind == "state space":
        return sequence_state_space(states=3, **sizes)
    return sequence_transformer(heads=2, positions="rotary" if kind == "rotary" else "sinusoidal", **sizes)


def method(kind: str = "transformer", share: float = 0.5, guess: StepGuess | None = None, **settings: Any) -> SPT:
    torch.manual_seed(0)
    return SPT(network(kind, **settings), MaskedSteps(StepMasks(share)), guess, **SGD).double()


def values(rows: int = 5, length: int = 12, channels: int = 1) -> dict[str, Any]:
    drawn = torch.randn(rows, length, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"sequence": drawn, "label": torch.arange(rows) % 3, "index": torch.arange(rows)}


def symbols(rows: int = 5, length: int = 12) -> dict[str, Any]:
    tokens = torch.randint(9, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) < torch.tensor([12, 12, 8, 3, 1])[:rows, None]).long()
    return {"tokens": tokens, "mask": mask, "label": torch.arange(rows) % 3, "index": torch.arange(rows)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["values", "symbols"])
def test_what_is_hidden_has_no_effect_on_any_output(kind: str, of: str) -> None:
    given = values() if of == "values" else symbols()
    model = method(kind, **({} if of == "values" else {"channels": None, "vocab_size": 9}))
    field = "sequence" if of == "values" else "tokens"
    hidden = StepMasks(0.5).draw(12, 4, given["index"])
    hidden = hidden if of == "values" else hidden & (given["mask"] != 0)
    changed = given[field].clone()
    changed[hidden] = (given[field][hidden] + 3) % 9

    def outputs(x: Tensor) -> Tensor:
        own = None if of == "values" else given["mask"] != 0
        return model.denoising_head(model.pretext(model.backbone, x, own, given["index"], 4).states_BLD)

    assert hidden.any()
    torch.testing.assert_close(outputs(changed), outputs(given[field]), atol=1e-6, rtol=0)
    seen = given[field].clone()
    seen[~hidden] = (seen[~hidden] + 3) % 9
    assert (outputs(seen) - outputs(given[field])).abs().max() > 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_the_input_map_is_that_of_concatenated_values_and_mask(channels: int) -> None:
    model, given = method(channels=channels), values(channels=channels)
    x, hidden = given["sequence"], StepMasks(0.5).draw(12, 0, given["index"])
    whole = nn.Linear(channels + 1, 8).double()
    with torch.no_grad():
        whole.weight.copy_(torch.cat([model.backbone.input.weight, model.pretext.column_D[:, None]], dim=1))
        whole.bias.copy_(model.backbone.input.bias)
    m = hidden[:, :, None].double()
    expected = whole(torch.cat([x * (1 - m), m], dim=2))
    torch.testing.assert_close(model.pretext.embedded(model.backbone, x, hidden), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_of_stage_2_is_that_of_stage_1_fed_with_a_mask_of_zeros(kind: str, tmp_path: Path) -> None:
    """As a recipe does it: from the file that `lightspan export` writes, by the names that begin with backbone."""
    model, given = method(kind).float(), {**values(), "sequence": values()["sequence"].float()}
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "run.safetensors")
    torch.manual_seed(1)
    started = with_weights(network(kind), str(tmp_path / "run.safetensors"))
    classifier = SequenceClassifier(started, 3, **SGD)
    x = given["sequence"]
    embedded = model.pretext.embedded(model.backbone, x, torch.zeros(x.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(
        classifier.features(given), model.backbone.encode(embedded).mean(dim=1), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(classifier.features(given), model.features(given), atol=0, rtol=0)


@pytest.mark.parametrize("length", [1, 12])
def test_with_nothing_hidden_the_loss_is_0_and_so_are_its_gradients(length: int) -> None:
    for guess in (ValueGuess(), LevelGuess(8)):
        model = method(share=0.0, guess=guess)
        loss = model.loss(values(length=length), 0)
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    nothing_own = {**symbols(), "mask": torch.zeros(5, 12, dtype=torch.int64)}
    assert method(share=1.0, channels=None, vocab_size=9).loss(nothing_own, 0) == 0


def test_the_losses_are_those_of_torch_over_hidden_steps_alone() -> None:
    given = values(channels=2)
    x, hidden = given["sequence"], StepMasks(0.5).draw(12, 7, given["index"])
    model = method(channels=2)
    guess = model.denoising_head(model.pretext(model.backbone, x, None, given["index"], 7).states_BLD)
    torch.testing.assert_close(model.loss(given, 7), F.l1_loss(guess[hidden], x[hidden]))

    model = method(channels=2, guess=LevelGuess(5, -2.0, 2.0))
    guess = model.denoising_head(model.pretext(model.backbone, x, None, given["index"], 7).states_BLD)
    nearest = (x[..., None] - torch.linspace(-2, 2, 5, dtype=torch.float64)).abs().argmin(dim=-1)
    expected = F.cross_entropy(guess[hidden].view(-1, 2, 5).flatten(0, 1), nearest[hidden].flatten())
    torch.testing.assert_close(model.loss(given, 7), expected)

    given = symbols()
    hidden &= given["mask"] != 0
    model = method(channels=None, vocab_size=9)
    states = model.pretext(model.backbone, given["tokens"], given["mask"] != 0, given["index"], 7).states_BLD
    expected = F.cross_entropy(model.denoising_head(states)[hidden], given["tokens"][hidden])
    torch.testing.assert_close(model.loss(given, 7), expected)


def test_training_hides_other_steps_in_each_step_and_validation_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, logged = method(), values(), dict[str, Any]()
    monkeypatch.setattr(type(model), "global_step", 6)
    monkeypatch.setattr(model, "log", lambda name, value, **_: logged.update({name: value}))
    assert model.training_step(given, 0) == model.loss(given, 6) != model.loss(given, 0)
    model.validation_step(given, 0)
    assert logged["val/absolute_error"] == model.loss(given, 0)
    turned = {name: field.flip(0) for name, field in given.items()}
    torch.testing.assert_close(model.loss(turned, 3), model.loss(given, 3))  # of a sequence's number, not its place


def test_no_value_marks_a_step_that_does_not_count() -> None:
    """-100 and -10,000 are values like any other."""
    given = values()
    given["sequence"] = torch.full_like(given["sequence"], -10_000.0)
    assert method(share=1.0).loss(given, 0) > 9_000
    assert method(share=1.0, guess=LevelGuess(2)).loss(given, 0) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_value_is_guessed_from_those_before_it_alone(kind: str) -> None:
    torch.manual_seed(0)
    model = SPT(network(kind, causal=True), NextValue(), **SGD).double()
    x, index = values()["sequence"], torch.arange(5)
    changed = x.clone()
    changed[:, 6:] = 9.0
    states, target, counted = model.pretext(model.backbone, x, None, index, 0)
    torch.testing.assert_close(
        model.pretext(model.backbone, changed, None, index, 0).states_BLD[:, :6], states[:, :6], atol=1e-6, rtol=0
    )
    assert torch.equal(target, x[:, 1:])
    assert counted.all()
    torch.testing.assert_close(model.loss(values(), 0), F.l1_loss(model.denoising_head(states), x[:, 1:]))
    assert model.loss(values(length=1), 0) == 0  # a single value has nothing after it


def test_of_texts_with_padding_only_a_texts_own_tokens_are_guessed() -> None:
    torch.manual_seed(0)
    model = SPT(network("transformer", channels=None, vocab_size=9, causal=True), NextValue(), **SGD).double()
    given = symbols()
    logits = model.denoising_head(model.backbone.encode(model.backbone.embed(given["tokens"]), given["mask"] != 0))
    own = given["mask"][:, 1:] != 0
    expected = F.cross_entropy(logits[:, :-1][own], given["tokens"][:, 1:][own])
    torch.testing.assert_close(model.loss(given, 0), expected)


def test_both_stages_have_the_same_training_sequences_and_none_that_are_held_out() -> None:
    stages = []
    for seed in (0, 1):  # of the order alone
        data = PixelSequences(Digits(), train_size=60, val_size=100, seed=seed, batch_size=20)
        with contextlib.redirect_stdout(io.StringIO()):
            data.setup()
        stages.append(data)
    first, second = ({row.tobytes() for row in stage.train.data.rows} for stage in stages if stage.train)
    assert first == second
    for held in (stages[0].val, stages[0].test):
        assert not first & {row.tobytes() for row in held.data.rows}
    seen = {batch["sequence"][row].mul(127.5).add(127.5).round().byte().numpy().tobytes()
            for batch in stages[0].train_dataloader() for row in range(20)}  # fmt: skip
    assert seen == first


def test_it_learns_to_fill_gaps(tmp_path: Path) -> None:
    """Of sequences that are constant, whose hidden values follow from any that is seen."""
    level = torch.linspace(-1, 1, 16)[:, None, None]
    given = {"sequence": level.expand(16, 12, 1), "index": torch.arange(16)}
    torch.manual_seed(0)
    model = SPT(network("transformer", width=16), optimizer=partial(torch.optim.Adam, lr=1e-2))
    losses = fit(model, [given] * 60, tmp_path)
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SPT(MLP((1, 8, 8), (4,)), **SGD), "SPT needs a network for sequences, and MLP has no channels"),
        (lambda: SPT(network("rotary"), NextValue(), **SGD), "NextValue needs a causal network"),
        (
            lambda: SPT(network("rotary"), guess=SymbolGuess(), **SGD),
            "SymbolGuess guesses symbols, and the network reads values",
        ),
        (
            lambda: SPT(network("rotary", channels=None, vocab_size=3), guess=LevelGuess(), **SGD),
            "LevelGuess guesses values, and the network reads symbols; take SymbolGuess",
        ),
        (lambda: LevelGuess(1), "LevelGuess count=1 must be at least 2"),
        (lambda: method().loss(symbols(), 0), "its network reads values as sequence, and this batch holds"),
        (lambda: method(channels=2).loss(values(), 0), r"reads sequence as float \[B, L, 2\], and this batch gives"),
        (lambda: method(channels=None, vocab_size=4).loss(values(), 0), "reads symbols as tokens"),
        (
            lambda: method(channels=None, vocab_size=9).loss(symbols() | {"mask": torch.ones(5, 3)}, 0),
            "a 0 or 1 for each token",
        ),
    ],
)
def test_parts_and_batches_that_do_not_fit_are_refused(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
