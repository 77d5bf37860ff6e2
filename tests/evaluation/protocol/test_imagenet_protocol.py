"""The ImageNet protocol: what it says of encoders whose answers are known, its heads beside torch's own, its parts."""

import copy
import io
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightspan.backbones.vision import SmallConvNet
from lightspan.core.errors import UserError
from lightspan.datamodules.image.augment.views import RandomViews
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.datamodules.loading.subset import balanced_part
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.probes.knn import knn_accuracy
from lightspan.evaluation.protocol.few_labels import SIMCLR, fine_tuned
from lightspan.evaluation.protocol.imagenet_protocol import LINEAR, NEIGHBOURS, ImageNetProtocol, answers
from lightspan.evaluation.protocol.linear_heads import LinearHeads, fit_linear_heads
from lightspan.evaluation.protocol.subject import EncoderAndFloor, Judged, ProtocolSubject
from lightspan.optim.groups import ParameterGroups


class Times(nn.Module):
    """Pictures of two pixels, times a factor, past a batch norm that changes if anything trains it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.norm = nn.Parameter(torch.tensor(factor)), nn.BatchNorm1d(2, affine=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.factor * self.norm(x_BCHW.flatten(1))


class Pictures:
    batch_type = ImageBatch

    def __init__(self, x: Tensor, label_N: Tensor) -> None:
        self.x, self.label_N, self.seen = x, label_N, list[int]()

    def __len__(self) -> int:
        return len(self.x)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        self.seen.append(index)
        return {"image": self.x[index], "label": self.label_N[index], "index": torch.tensor(index)}


def pictures(first: int, second: int, seed: int) -> Pictures:
    """Two classes of so many samples, the first with a bright left pixel, the second with a bright right one."""
    label_N = torch.tensor([0] * first + [1] * second)
    noise = 0.05 * torch.randn(len(label_N), 1, 1, 2, generator=torch.Generator().manual_seed(seed))
    return Pictures(noise + torch.nn.functional.one_hot(label_N, 2)[:, None, None].float(), label_N)


def subject(batch_size: int = 16) -> ProtocolSubject:
    """Classes that a line separates, 60 and 40; and as a floor a network that sees nothing, whatever it is shown."""
    train, query = pictures(60, 40, 0), pictures(15, 35, 1)

    def judged(factor: float) -> Judged:
        network = Times(factor).eval()
        with torch.no_grad():
            sides = (Features(network(one.x), one.label_N, torch.arange(len(one))) for one in (train, query))
            return Judged(network, *sides)

    return ProtocolSubject(judged(1.0), judged(0.0), train, EvaluationLoader(query, 20), batch_size)


QUICK: dict[str, Any] = {"rates": (1.0, 5.0), "epochs": 5, "tuning_epochs": (20, 20), "shares": (0.05, 0.2)}
LARGE = partial(torch.optim.SGD, lr=5.0, momentum=0.9)


def test_every_figure_of_separable_classes_and_of_a_network_that_sees_nothing_is_known() -> None:
    result = ImageNetProtocol(**QUICK, optimizer=LARGE).fit(subject())
    assert {row["protocol"]: row["accuracy"] for row in result.rows} == {
        NEIGHBOURS: 1.0, LINEAR: 1.0, "fine-tuned on 5 %": 1.0, "fine-tuned on 20 %": 1.0,
    }  # fmt: skip
    floors = {row["protocol"]: row["floor"] for row in result.rows}
    assert floors[LINEAR] == 0.3  # the more frequent class in training, which 15 of 50 have
    assert floors["fine-tuned on 5 %"] == floors["fine-tuned on 20 %"] == 0.3  # of equally frequent ones the first
    assert (result.chance, result.classes, result.train, result.evaluated) == (0.3, 2, 100, 50)
    row = result.row(LINEAR)
    assert row["gain"] == pytest.approx(0.7)
    assert row["interval"] == pytest.approx(1.96 * (0.7 * 0.3 / 50) ** 0.5)


def test_parts_of_the_labels_have_as_many_of_each_class_and_the_smaller_one_lies_in_the_larger() -> None:
    rows = {row["protocol"]: row for row in ImageNetProtocol(**QUICK | {"rates": ()}).fit(subject()).rows}
    found = [tuple(rows[f"fine-tuned on {share} %"][key] for key in ("labels", "fewest", "most")) for share in (5, 20)]
    assert found == [(4, 2, 2), (20, 10, 10)]  # 5 % of 100 are 2.5 of each class, and 2.5 rounds to 2
    labels = torch.tensor([3] * 50 + [0] * 7 + [8] * 20)[torch.randperm(77, generator=torch.Generator().manual_seed(0))]
    parts = [balanced_part(labels.numpy(), each, seed=4) for each in (1, 5, 9, 100)]
    assert [labels[torch.from_numpy(part)].bincount().tolist() for part in parts] == [
        [1, 0, 0, 1, 0, 0, 0, 0, 1], [5, 0, 0, 5, 0, 0, 0, 0, 5], [7, 0, 0, 9, 0, 0, 0, 0, 9],
        [7, 0, 0, 50, 0, 0, 0, 0, 20],
    ]  # fmt: skip
    assert all({*small} < {*large} and [*small] == sorted(small) for small, large in pairwise(parts))
    assert [*balanced_part(labels.numpy(), 5, seed=5)] != [*parts[1]]


def test_fine_tuning_reads_its_part_of_the_training_samples_and_no_other() -> None:
    given = subject()
    ImageNetProtocol(rates=(), shares=(0.2,), tuning_epochs=(2,), seed=3).fit(given)
    assert isinstance(given.training, Pictures)
    assert {*given.training.seen} <= {*balanced_part(given.training.label_N.numpy(), 10, seed=3).tolist()}
    assert len(given.training.seen) == 2 * 2 * 16  # two networks, two epochs of one whole batch of 16


@pytest.mark.parametrize("normalised", [False, True])
def test_heads_side_by_side_are_those_that_torch_trains_alone(normalised: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(7)]
    rates = (0.5, 8.0, 64.0)
    heads = fit_linear_heads(lambda x: 2 * x, batches, 7, 8, rates, 3, 0.9, normalised)
    query = torch.randn(4, 5, generator=generator)
    for rate, logits_BK in zip(rates, heads(query), strict=True):
        norm = nn.BatchNorm1d(5, eps=1e-6, affine=False) if normalised else nn.Identity()
        alone = nn.Sequential(norm, nn.Linear(5, 3))
        for parameter in alone.parameters():
            nn.init.zeros_(parameter)
        optimizer = torch.optim.SGD(alone.parameters(), lr=rate * 8 / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
        for x, label in batches:
            optimizer.zero_grad()
            cross_entropy(alone(2 * x), label).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(logits_BK, alone.eval()(query), rtol=1e-4, atol=1e-5)


def test_neighbours_are_those_of_the_knn_probe() -> None:
    given = subject()
    x_ND = torch.randn(100, 2, generator=torch.Generator().manual_seed(2))
    given = ProtocolSubject(
        Judged(given.encoder.network, Features(x_ND, given.encoder.bank.label_N), given.encoder.query),
        *(given.floor, given.training, given.evaluated),
    )
    bank, query = given.encoder.bank, given.encoder.query
    expected = knn_accuracy(bank.rows(), bank.classes(), query.rows(), query.classes(), 7, 0.2)
    found = ImageNetProtocol(k=7, temperature=0.2, rates=(), shares=(), tuning_epochs=()).fit(given)
    assert found.row(NEIGHBOURS)["accuracy"] == pytest.approx(expected)
    assert 0 < expected < 1


def test_what_is_scored_takes_no_part_in_the_choice_of_the_rate() -> None:
    given = subject()
    before = ImageNetProtocol(**QUICK | {"rates": (1e-6, 0.1, 1.0)}).fit(given)
    wrong = Features(given.encoder.query.x, 1 - given.encoder.query.classes())
    turned = ProtocolSubject(
        Judged(given.encoder.network, given.encoder.bank, wrong), given.floor, given.training, given.evaluated, 16
    )
    after = ImageNetProtocol(**QUICK | {"rates": (1e-6, 0.1, 1.0)}).fit(turned)
    assert (after.rate, [row["held_out"] for row in after.rates]) == (
        before.rate,
        [row["held_out"] for row in before.rates],
    )
    assert after.row(LINEAR)["accuracy"] == 1 - before.row(LINEAR)["accuracy"]


def test_the_encoder_stays_as_it_was_and_a_second_run_is_equal() -> None:
    given = subject()
    before = copy.deepcopy(given.encoder.network.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (ImageNetProtocol(**QUICK, optimizer=LARGE).fit(given) for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert not given.encoder.network.training
    for name, value in given.encoder.network.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_rate_at_which_a_head_diverges_is_never_right() -> None:
    scores = torch.tensor([[0.0, 2.0], [torch.nan, 1.0], [torch.inf, 0.0], [1.0, 0.0]])
    assert answers(scores).tolist() == [1, -1, -1, 0]
    heads = LinearHeads(2, 3, 4, normalised=False)
    assert heads(torch.ones(5, 3)).shape == (2, 5, 4)


def test_rates_of_fine_tuning_are_those_of_256_samples_and_fall_from_layer_to_layer() -> None:
    made = list[torch.optim.Optimizer]()

    def sgd(groups: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(groups, lr=0.2))
        return made[-1]

    given = subject()
    groups = ParameterGroups(layer_decay=0.5, layers=["network.factor"])
    fine_tuned(given, given.encoder, [], 1, 64, 2, sgd, groups)
    rates = {group["params"][0].ndim: group["initial_lr"] for group in made[0].param_groups}
    assert rates == pytest.approx({0: 0.5 * 0.2 * 64 / 256, 2: 0.2 * 64 / 256, 1: 0.2 * 64 / 256})
    (group,) = SIMCLR([torch.zeros(1, requires_grad=True)]).param_groups
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.05, 0.9, True, 0)


def test_a_transformer_of_timms_is_tuned_from_layer_to_layer_and_its_head_at_the_full_rate() -> None:
    made = list[torch.optim.Optimizer]()

    def adamw(groups: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(groups, lr=1.0, weight_decay=0.05))
        return made[-1]

    given, settings = subject(), {"img_size": (1, 2), "patch_size": 1, "in_chans": 1, "embed_dim": 8, "num_heads": 2}
    network = VisionTransformer(depth=2, num_classes=0, **settings).eval()
    features = Features(torch.zeros(100, 8), given.encoder.bank.label_N)
    before = copy.deepcopy(network.state_dict())
    judged = Judged(network, features, features)
    batches = list(given.batches(torch.arange(100), 1, 0))
    groups = ParameterGroups(layer_decay=0.65)
    logits_MK = fine_tuned(given, judged, batches, len(batches), 256, 2, adamw, groups, warmup=0.2)
    rates = {p: group["initial_lr"] for group in made[0].param_groups for p in group["params"]}
    sizes = {tuple(p.shape): rate for p, rate in rates.items()}
    assert sizes[2, 8] == 1.0  # the head, whose rate is whole
    by_layer = sorted({round(rate, 6) for rate in rates.values()}, reverse=True)
    assert by_layer == pytest.approx([0.65**depth for depth in range(len(by_layer))], abs=1e-6)
    assert len(by_layer) >= 4  # stem, two blocks and the head
    assert logits_MK.shape == (50, 2)
    assert logits_MK.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_it_is_read_from_a_data_module_with_its_augmentation(tmp_path: Path) -> None:
    views = RandomViews(count=1, scale=(0.5, 1.0), flip=0, jitter=0)
    data = Digits(train_size=200, batch_size=64, views=views)
    torch.manual_seed(0)
    made = EncoderAndFloor(SmallConvNet(1, 8, 2), SmallConvNet(1, 8, 2), data)
    given = made.load(FeatureStore(tmp_path, 1, torch.device("cpu")))
    x, label = next(given.batches(torch.arange(40), 1, 0))
    assert x.shape == (40, 1, 8, 8)
    assert not any(torch.equal(one, given_) for one in x for given_ in [data.bank.sample(0, 0)["image"]])
    assert label.dtype == torch.int64
    assert "the same with random weights" in made.outlook(FeatureStore(tmp_path, 1, torch.device("cpu")))
    result = ImageNetProtocol(rates=(0.1,), epochs=1, shares=(0.1,), tuning_epochs=(1,)).fit(given)
    assert [row["labels"] for row in result.rows] == [200, 180, 20]
    drawn = result.picture("title")
    assert drawn is not None
    assert Image.open(io.BytesIO(drawn)).size[0] > 100


def test_timms_statistics_take_the_place_of_the_data_s(tmp_path: Path) -> None:
    data = Digits(train_size=100, batch_size=50)
    network, floor = SmallConvNet(1, 4, 1), SmallConvNet(1, 4, 1)
    network.pretrained_cfg = {"mean": (0.5,), "std": (0.25,)}  # type: ignore[assignment]
    given = EncoderAndFloor(network, floor, data, standardised="timm").load(
        FeatureStore(tmp_path, 1, torch.device("cpu"))
    )
    (rescaled,) = given.encoder.transforms
    low, high = data.bounds
    torch.testing.assert_close(rescaled(low), torch.tensor(-2.0).view(1, 1, 1))
    torch.testing.assert_close(rescaled(high), torch.tensor(2.0).view(1, 1, 1))
    with pytest.raises(UserError, match="standardised=timm"):
        EncoderAndFloor(floor, network, data, standardised="timm").load(FeatureStore(tmp_path, 1, torch.device("cpu")))


def test_wrong_inputs_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="floor is to be"):
        EncoderAndFloor(SmallConvNet(1, 4, 2), SmallConvNet(1, 4, 1), Digits())
    store = FeatureStore(tmp_path, 1, torch.device("cpu"))
    with pytest.raises(UserError, match=r"SmallConvNet cannot read inputs \[\d+, 1, 8, 8\].*--image-size"):
        EncoderAndFloor(SmallConvNet(3, 4, 1), SmallConvNet(3, 4, 1), Digits()).load(store)
    half = SmallConvNet(1, 4, 1).bfloat16()
    with pytest.raises(UserError, match=r"SmallConvNet cannot read .*bfloat16.* give it in float32"):
        EncoderAndFloor(half, half, Digits()).load(store)
    with pytest.raises(UserError, match="batch_size=1"):  # as of a folder of three pictures
        ImageNetProtocol(**QUICK).fit(subject(batch_size=1))
    on_device = Digits(train_size=50, views=RandomViews(count=1), views_on="device")
    given = EncoderAndFloor(SmallConvNet(1, 4, 1), SmallConvNet(1, 4, 1), on_device).load(store)
    with pytest.raises(UserError, match="views_on"):
        ImageNetProtocol(k=1).fit(given)
