"""Rules by name and layer-wise decay: who gets which rate and which decay, and that groups without either stay."""

import copy
import math
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.optim import param_groups_layer_decay
from torch import nn

from lightspan.adapters.full import Full
from lightspan.adapters.inject import adapt
from lightspan.backbones.diffusion import DiT
from lightspan.backbones.language import llama
from lightspan.backbones.vision import SmallConvNet
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.optim.groups import ParameterGroups, Rule
from lightspan.optim.low_rank.presets import Trion


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3)])
        self.head = nn.Linear(8, 10)


class Headed(nn.Module):
    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.head, self.backbone = nn.Linear(width, 10), backbone  # in either order


def settings(groups: ParameterGroups, module: nn.Module, **options: float) -> dict[str, tuple[float, float, bool]]:
    """Rate, decay and whether it may be projected, by parameter, of an AdamW with rate 1 and decay 0.5."""
    optimizer = groups.optimizer(module, lambda params: torch.optim.AdamW(params, lr=1.0, weight_decay=0.5))
    return {
        name: (group["lr"], group["weight_decay"], group["project"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_each_setting_comes_from_the_first_rule_that_sets_it_and_then_from_the_kind() -> None:
    rules = [
        Rule(["head.*"], lr_scale=10.0),
        Rule(["head.weight", "embed.*"], lr_scale=0.1, weight_decay=0.2),
        Rule(["blocks.2.0.weight"], kind="vectors"),
        Rule(["*.bias"], weight_decay=0.3),
    ]
    found = settings(ParameterGroups(rules=rules, other_lr=2.0), Net())
    assert found["head.weight"] == (10.0, 0.2, True)
    assert found["head.bias"] == (20.0, 0.3, False)
    assert found["embed.weight"] == (0.2, 0.2, False)
    assert found["blocks.0.0.weight"] == (1.0, 0.5, True)
    assert found["blocks.2.0.weight"] == (2.0, 0.0, False)
    assert found["blocks.1.1.weight"] == (2.0, 0.0, False)
    assert found["blocks.1.1.bias"] == (2.0, 0.3, False)


def test_a_rule_stands_above_a_modules_own_word() -> None:
    net = Net()
    net.head.parameter_kinds = {"weight": "embeddings"}
    assert settings(ParameterGroups(), net)["head.weight"] == (1.0, 0.0, False)
    rule = Rule(["head.weight"], kind="matrices")
    assert settings(ParameterGroups(rules=[rule]), net)["head.weight"] == (1.0, 0.5, True)


def test_an_adapter_leaves_a_modules_word_with_its_weight_and_a_full_change_has_the_same_kind() -> None:
    net = Net()
    net.head.parameter_kinds = {"weight": "embeddings"}
    adapt(net, ["head"], Full(), name="task", show=False)
    found = settings(ParameterGroups(), net)
    assert found["head.adapters.task.change"] == (1.0, 0.0, False)
    net.head.base.requires_grad_(True)
    assert settings(ParameterGroups(), net)["head.base.weight"] == (1.0, 0.0, False)


def test_groups_that_no_rule_cuts_are_those_without_rules() -> None:
    plain, cut = (
        [{**group, "params": [name for name, _ in group["params"]]} for group in groups.build(Net())]
        for groups in (ParameterGroups(), ParameterGroups(rules=[Rule(["*"], lr_scale=1.0)], layer_decay=1.0))
    )
    assert cut == plain
    assert [sorted(group) for group in plain] == [["name", "params", "project"]] + [
        ["name", "params", "project", "weight_decay"]
    ] * 2


def test_names_of_groups_are_unique_and_stable_and_their_state_loads() -> None:
    close = [Rule([f"blocks.{i}.0.weight"], lr_scale=1 + i * 1e-9) for i in range(3)]
    groups = ParameterGroups(rules=[*close, Rule(["head.weight"], weight_decay=0.0)], other_lr=0.5)
    net = Net()
    optimizers = [groups.optimizer(module, partial(torch.optim.AdamW, lr=0.1)) for module in (net, copy.deepcopy(net))]
    names = [[group["name"] for group in optimizer.param_groups] for optimizer in optimizers]
    assert names[0] == ["matrices", "matrices-lr1", "matrices-lr1-2", "matrices-wd0", "embeddings", "vectors"]
    assert names[1] == names[0]
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert [g["lr"] for g in optimizers[1].param_groups] == [g["lr"] for g in optimizers[0].param_groups]


def test_rates_that_an_optimiser_chooses_itself_are_scaled_too() -> None:
    groups = ParameterGroups(rules=[Rule(["head.*"], lr_scale=10.0)])
    optimizer = groups.optimizer(Net(), lambda params: Trion(params, lr=0.02, rank=2, other_lr=1e-3))
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert (rates["blocks.0.0.weight"], rates["head.weight"], rates["head.bias"]) == pytest.approx((0.02, 0.2, 0.01))


@pytest.mark.parametrize("other_lr", [0.02, 0.01])
def test_rates_of_layers_that_meet_that_of_other_matrices_are_no_schedule_with_one_rate(other_lr: float) -> None:
    net = Net()
    optimizer = ParameterGroups(layer_decay=0.5).optimizer(net, lambda p: Trion(p, lr=0.02, rank=2, other_lr=other_lr))
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(group["lr"] == group.get("other_lr", group["lr"]) for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_layer_decay_of_a_timm_network_is_that_of_timm(name: str) -> None:
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=10)
        headed = Headed(timm.create_model(name, num_classes=0), 4)
    expected = {
        id(p): group["lr_scale"] for group in param_groups_layer_decay(whole, layer_decay=0.5) for p in group["params"]
    }
    found = settings(ParameterGroups(layer_decay=0.5), headed)
    assert found["head.weight"][0] == 1.0
    compared = {
        f"backbone.{n}": expected[id(p)] for n, p in whole.named_parameters() if not n.startswith(("head", "fc."))
    }
    assert len(compared) > 50
    assert {key: found[key][0] for key in compared} == compared


@pytest.mark.parametrize(
    ("backbone", "first", "block", "last"),
    [
        (lambda: llama(vocab_size=16, width=8, depth=2, heads=2, mlp_width=8, context=8), "model.embed_tokens.weight",
         "model.layers.{}.mlp.up_proj.weight", "model.norm.weight"),
        (lambda: DiT(image_size=8, patch_size=4, width=8, depth=2, heads=2), "patch_embed.proj.weight",
         "blocks.{}.mlp.fc1.weight", "modulation.weight"),
    ],
    ids=["llama", "DiT"],
)  # fmt: skip
def test_numbered_blocks_are_layers_and_heads_keep_the_full_rate(backbone, first, block, last) -> None:
    found = settings(ParameterGroups(layer_decay=0.5), Headed(backbone(), 4))
    rates = [found[f"backbone.{name}"][0] for name in (first, block.format(0), block.format(1))]
    assert rates == [0.125, 0.25, 0.5]
    assert found["head.weight"][0] == found["head.bias"][0] == 1.0
    assert found[f"backbone.{last}"][0] == 1.0


class HeadFirst(nn.Module):
    def __init__(self, head: str = "head") -> None:
        super().__init__()
        setattr(self, head, nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])


@pytest.mark.parametrize("head", ["head", "classifier", "lm_head", "fc", "head_dist"])
@pytest.mark.parametrize("inside", ["", "0."])
def test_a_head_has_the_full_rate_wherever_it_is_registered(head: str, inside: str) -> None:
    net = HeadFirst(head)
    found = settings(ParameterGroups(layer_decay=0.5), nn.Sequential(net) if inside else net)
    assert [found[f"{inside}{name}.weight"][0] for name in (f"{head}.0", "stem.0", "blocks.0", "blocks.1")] == [
        1.0, 0.125, 0.25, 0.5
    ]  # fmt: skip


def tied() -> Net:
    net = Net()
    net.head.weight = net.embed.weight
    return net


def test_a_rule_matches_a_tied_weight_by_any_of_its_names() -> None:
    for pattern in ("head.weight", "embed.weight"):
        found = settings(ParameterGroups(rules=[Rule([pattern], lr_scale=3.0, weight_decay=0.25)]), tied())
        assert found["embed.weight"] == (3.0, 0.25, False)
    assert settings(ParameterGroups(["head.weight"]), tied())["embed.weight"] == (1.0, 0.0, False)
    layers = ParameterGroups(layer_decay=0.5, layers=["head.weight", "blocks.*"])
    assert settings(layers, tied())["embed.weight"][0] == 0.25
    with pytest.raises(UserError, match=r"'head\.wieght' matches no trained parameter of Net"):
        ParameterGroups(rules=[Rule(["head.wieght"], lr_scale=3.0)]).optimizer(tied(), torch.optim.AdamW)


def test_a_weight_tied_to_the_embeddings_is_not_that_of_a_head() -> None:
    net = HeadFirst()
    net.stem[0].weight = net.head[0].weight
    assert settings(ParameterGroups(layer_decay=0.5), net)["head.0.weight"][0] == 0.125


@pytest.mark.parametrize("trained", ["model.layers.2.", "head."])
def test_freezing_does_not_change_the_depth_of_what_trains(trained: str) -> None:
    net = llama(vocab_size=16, width=8, depth=3, heads=2, mlp_width=8, context=8)
    headed = nn.ModuleDict({"backbone": net, "teacher": copy.deepcopy(net), "head": nn.Linear(8, 2)})
    headed["teacher"].requires_grad_(False)
    if trained == "head.":
        del headed["teacher"]  # two frozen networks side by side would tell no order
    whole = settings(ParameterGroups(layer_decay=0.5), Headed(net, 8))
    net.requires_grad_(False)
    net.model.layers[2].requires_grad_(True) if trained != "head." else None
    found = settings(ParameterGroups(layer_decay=0.5), headed)
    assert any(trained in name for name in found)
    assert found == {name: whole[name] for name in found}


def test_layers_can_be_named() -> None:
    groups = ParameterGroups(layer_decay=0.5, layers=["*layers.0.*", "*layers.[1-3].*"], rules=[Rule(["*.0.*"], 3.0)])
    found = settings(groups, Headed(SmallConvNet(stages=2), 4))
    assert found["backbone.layers.0.weight"][0] == 0.75
    assert found["backbone.layers.3.weight"][0] == 0.5
    assert found["backbone.layers.4.weight"][0] == found["head.bias"][0] == 1.0


def test_frozen_layers_can_be_named() -> None:
    net = Net()
    net.blocks[0].requires_grad_(False)
    found = settings(ParameterGroups(layer_decay=0.5, layers=["blocks.0.*", "blocks.1.*"]), net)
    assert found["blocks.1.0.weight"][0] == 0.5


REFUSED = {
    "a pattern that matches nothing": (
        {"rules": [Rule(["head.*", "haed.weight"], 2.0)]},
        r"'haed\.weight' matches no trained parameter of Net \(groups\.rules\[0\]\); names look like head\.weight",
    ),
    "a layer that matches nothing": (
        {"layer_decay": 0.5, "layers": ["block.0.*"]},
        r"'block\.0\.\*' matches no parameter of Net \(groups\.layers\); names look like blocks\.2",
    ),
    "no pattern": ({"rules": [Rule([], 2.0)]}, r"groups\.rules\[0\]\.match is empty"),
    "nothing set": ({"rules": [Rule(["*"])]}, r"groups\.rules\[0\] sets nothing; give it lr_scale,"),
    "no rate": ({"rules": [Rule(["*"], 0.0)]}, r"groups\.rules\[0\]\.lr_scale=0\.0 must be finite and above 0"),
    "negative decay": ({"rules": [Rule(["*"], None, -1.0)]}, r"weight_decay=-1\.0 must be finite and at least 0"),
    "a rate that is no number": ({"rules": [Rule(["*"], math.nan)]}, r"lr_scale=nan must be finite and above 0"),
    "a rate without end": ({"rules": [Rule(["*"], math.inf)]}, r"lr_scale=inf must be finite and above 0"),
    "a decay that is no number": ({"rules": [Rule(["*"], None, math.nan)]}, r"weight_decay=nan must be finite and at"),
    "another rate that is no number": ({"other_lr": math.nan}, r"groups\.other_lr=nan must be finite and above 0"),
    "a share that is no number": ({"layer_decay": math.nan}, r"groups\.layer_decay=nan must be in \(0, 1\]"),
    "unknown kind": ({"rules": [Rule(["*"], kind="matrix")]}, r"kind='matrix' must be one of matrices, embeddings"),
    "decay above one": ({"layer_decay": 1.5}, r"groups\.layer_decay=1\.5 must be in \(0, 1\]"),
    "layers alone": ({"layers": ["*"]}, r"groups\.layers has an effect only with groups\.layer_decay"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_hold_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        ParameterGroups(**options).build(Net())


def test_a_network_without_layers_asks_for_their_names() -> None:
    said = r"Linear has no list of equal blocks.*model\.init_args\.groups\.layers\).*without the head"
    with pytest.raises(UserError, match=said):
        ParameterGroups(layer_decay=0.5).build(nn.Linear(2, 2))


def test_recipes_set_rules_and_misspelt_ones_are_found_before_a_run() -> None:
    groups = "model.init_args.groups"
    resolve(
        "compression/vit", [], [f"{groups}.rules=[{{match: ['head.*'], lr_scale: 10}}]", f"{groups}.layer_decay=0.7"]
    )
    with pytest.raises(UserError, match=r"lr_scal: unknown; did you mean lr_scale"):
        resolve("compression/vit", [], [f"{groups}.rules=[{{match: ['head.*'], lr_scal: 10}}]"])
    with pytest.raises(UserError, match=r"rules\.0\.lr_scale"):
        resolve("compression/vit", [], [f"{groups}.rules=[{{match: ['head.*'], lr_scale: high}}]"])


def test_groups_whose_rates_are_to_be_scaled_are_not_handed_out_without_their_optimiser() -> None:
    with pytest.raises(UserError, match="build it with ParameterGroups"):
        ParameterGroups(rules=[Rule(match=["*"], lr_scale=0.1)]).build(nn.Linear(2, 2))


def test_a_network_that_is_itself_the_list_of_blocks_has_them_as_layers() -> None:
    found = settings(ParameterGroups(layer_decay=0.5), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert [found[f"{number}.weight"][0] for number in (0, 1)] == [0.25, 0.5]


def test_lists_of_blocks_side_by_side_tell_no_layers() -> None:
    with pytest.raises(UserError, match=r"side by side \(layer3, layer1, layer2, layer4\)"):
        ParameterGroups(layer_decay=0.5).optimizer(torchvision.models.resnet50(num_classes=2), torch.optim.AdamW)


def test_trions_groups_have_names_that_a_rate_monitor_tells_apart() -> None:
    net = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 2))
    optimizer = ParameterGroups().optimizer(net, partial(Trion, rank=4))
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["matrices", "matrices-other", "vectors"]
