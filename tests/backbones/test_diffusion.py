import pytest
import torch
from torch import Tensor, nn

from lightspan.backbones.diffusion import DiT, level_waves
from lightspan.errors import UserError


def dit(**settings: int) -> DiT:
    torch.manual_seed(0)
    return DiT(**({"image_size": 8, "patch_size": 2, "in_chans": 3, "width": 16, "depth": 2, "heads": 2} | settings))


def awake(model: DiT) -> DiT:
    """What starts at zero moved, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def inputs(rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, 8, 8, generator=generator), torch.arange(rows) * 300


def test_at_the_start_blocks_are_the_identity_and_the_prediction_is_zero() -> None:
    model, (x, level) = dit(), inputs()
    assert not model(x, level).any()
    tokens, condition = torch.randn(3, 16, 16), torch.randn(3, 16)
    assert torch.equal(model.blocks[0](tokens, condition), tokens)


def test_every_parameter_takes_part_once_awake() -> None:
    model, (x, level) = awake(dit(num_classes=4)), inputs()
    model(x, level, torch.tensor([0, 1, 4])).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_patches_return_to_their_places() -> None:
    model, (x, _) = dit(), inputs()
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2)  # B C rows columns 2 2
    assert torch.equal(model._image(patches.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)), x)


def test_level_and_class_change_the_prediction_and_images_do_not_meet() -> None:
    model, (x, level) = awake(dit(num_classes=4)).eval(), inputs()
    label = torch.tensor([0, 1, 2])
    y = model(x, level, label)
    assert not torch.allclose(y, model(x, level + 1, label))
    assert not torch.allclose(y, model(x, level, label + 1))
    torch.testing.assert_close(y[1:2], model(x[1:2], level[1:2], label[1:2]), rtol=1e-4, atol=1e-5)


def test_no_label_is_the_row_for_no_class() -> None:
    model, (x, level) = awake(dit(num_classes=4)), inputs()
    assert torch.equal(model(x, level), model(x, level, torch.full((3,), 4)))


def test_the_label_table_is_a_table() -> None:
    model = dit(num_classes=4)
    one_hot = nn.functional.one_hot(torch.tensor([2]), 5).float()
    assert torch.equal(model.label(one_hot)[0], model.label.weight[:, 2])


def test_level_waves_are_cosines_and_sines() -> None:
    waves = level_waves(torch.tensor([0, 7]), frequencies=4)
    frequency = 10_000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(waves[1], torch.cat([(7 * frequency).cos(), (7 * frequency).sin()]))
    assert waves[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("bad", [{"patch_size": 3}, {"heads": 3}, {"width": 18}, {"depth": 0}, {"num_classes": -1}])
def test_sizes_that_do_not_divide_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"patch_size=\d must divide image_size=8, heads=\d and 4 must divide"):
        dit(**bad)
