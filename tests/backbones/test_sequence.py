"""Networks for sequences: padding, causality, positions, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightspan.backbones.sequence import SequenceNetwork, sequence_state_space, sequence_transformer
from lightspan.core.errors import UserError
from lightspan.nn.tokens import token_features

KINDS: dict[str, Callable[..., SequenceNetwork]] = {
    "sinusoidal": lambda **o: sequence_transformer(width=8, depth=2, heads=2, **o),
    "rotary": lambda **o: sequence_transformer(width=8, depth=2, heads=2, positions="rotary", **o),
    "chunks": lambda **o: sequence_transformer(width=8, depth=2, heads=2, window=4, **o),
    "hippo": lambda **o: sequence_state_space(width=8, depth=2, states=3, **o),
    "random": lambda **o: sequence_state_space(width=8, depth=2, states=3, start="random", **o),
}


def network(kind: str, **settings: Any) -> SequenceNetwork:
    torch.manual_seed(0)
    return KINDS[kind](**settings).double().eval()


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_mlps_are_four_times_as_wide_as_the_states_unless_told() -> None:
    for told, width in ((None, 32), (16, 16)):
        built = sequence_transformer(width=8, depth=2, heads=2, mlp_width=told)
        assert [tuple(block.mlp[0].weight.shape) for block in built.blocks] == [(width, 8)] * 2
        assert built(draw(2, 5, 1).float()).shape == (2, 8)
    with pytest.raises(UserError, match="mlp_width=0"):
        sequence_transformer(mlp_width=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_mean_over_a_sequences_own_steps_whatever_padding_holds(kind: str, causal: bool) -> None:
    built = network(kind, channels=None, vocab_size=9, causal=causal)
    length_B = torch.tensor([10, 7, 1])
    own = torch.arange(10) < length_B[:, None]
    tokens = torch.randint(9, (3, 10), generator=torch.Generator().manual_seed(2))
    given = built(tokens.where(own, 3), own)
    torch.testing.assert_close(built(tokens.where(own, 5), own), given, atol=1e-10, rtol=0)
    for row, length in enumerate(length_B.tolist()):
        alone = tokens[row : row + 1, :length]
        torch.testing.assert_close(given[row], built(alone)[0], atol=1e-8, rtol=0)
        states = built.encode(built.embed(alone))
        torch.testing.assert_close(given[row], states.mean(dim=1)[0], atol=1e-8, rtol=0)
    assert not built(tokens, torch.zeros_like(own)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_causal_network_does_not_see_what_follows_and_any_other_does(kind: str) -> None:
    x = draw(2, 12, 3)
    changed = x.clone()
    changed[:, 7:] = 2.0
    for causal in (True, False):
        built = network(kind, channels=3, causal=causal)
        before, after = (built.encode(built.embed(given))[:, :7] for given in (x, changed))
        assert built.causal == causal
        if causal:
            torch.testing.assert_close(after, before, atol=1e-8, rtol=0)
        else:
            assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_order_matters(kind: str) -> None:
    built, x = network(kind, channels=3), draw(2, 12, 3)
    assert (built(x) - built(x.flip(1))).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_a_step_has_features_of_0(kind: str) -> None:
    assert not network(kind, channels=3)(draw(2, 0, 3)).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 13])
def test_any_length_trains_every_weight_in_bfloat16(kind: str, length: int) -> None:
    built = network(kind, channels=3).float()
    with torch.autocast("cpu", torch.bfloat16):
        given = built(draw(2, length, 3).float())
    given.float().square().sum().backward()
    assert given.shape == (2, 8)
    gradients = {name: parameter.grad for name, parameter in built.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())


def test_layers_are_read_by_number() -> None:
    built, x = network("hippo", channels=3), draw(2, 6, 3)
    first, last = token_features(built, lambda: built(x), (0, -1))
    assert first.tokens_BTD.shape == (2, 6, 8)
    torch.testing.assert_close(built.norm(last.tokens_BTD).mean(dim=1), built(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocab_size": 4}, "channels=1 and vocab_size=4: set the first for values"),
        ({"channels": None}, "channels=None and vocab_size=None"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"width": 7, "heads": 1}, "width even for sinusoidal positions"),
        ({"positions": "learned"}, "positions='learned' must be sinusoidal, rotary or none"),
        ({"dropout": 1.5}, r"dropout=1.5 must lie in \[0, 1\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        sequence_transformer(**settings)
