import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lightspan.backbones.vision import MLP, LeNet, SmallConvNet, timm_backbone
from lightspan.core.errors import UserError


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0", "vgg11", "convnext_atto"])
def test_a_layer_behind_the_pooling_counts_in_the_width_that_a_timm_backbone_names(name: str) -> None:
    with torch.device("meta"):
        network = timm_backbone(name).eval()
        features = network(torch.zeros(1, 3, 224, 224))
    assert features.shape == (1, network.num_features)


def test_a_timm_backbone_gives_pooled_features_of_the_width_it_names() -> None:
    network = timm_backbone("resnet10t", in_chans=1).eval()
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, network.num_features)


def test_without_the_small_stem_the_network_is_timms_own() -> None:
    torch.manual_seed(0)
    ours = timm_backbone("resnet18", in_chans=1).eval()
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", in_chans=1, num_classes=0).eval()
    x = torch.randn(1, 1, 32, 32)
    assert torch.equal(ours(x), theirs(x))


def test_the_small_stem_keeps_the_resolution_up_to_the_first_stage() -> None:
    network = timm_backbone("resnet18", in_chans=1, small_stem=True)
    seen: list[torch.Size] = []
    network.layer1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, network.num_features)
    assert seen == [torch.Size([2, 64, 8, 8])]


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"timm has no network named 'resnet81'; did you mean .*resnet"):
        timm_backbone("resnet81")


def test_the_small_stem_is_refused_where_it_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224 has no ResNet stem .* set small_stem to false"):
        timm_backbone("vit_tiny_patch16_224", small_stem=True)
    with pytest.raises(UserError, match="small_stem=true replaces the first convolution"):
        timm_backbone("resnet18", small_stem=True, pretrained=True)


@pytest.mark.parametrize("size", [8, 28, 5])
def test_small_conv_net_maps_any_resolution_to_its_features(size: int) -> None:
    network = SmallConvNet(in_chans=2, width=6, stages=3)
    assert network.num_features == 24
    assert network(torch.randn(3, 2, size, size)).shape == (3, 24)


@pytest.mark.parametrize(("network", "shape"), [(MLP((2, 5, 4), (7, 6)), (2, 5, 4)), (LeNet((3, 17, 20)), (3, 17, 20))])
def test_nets_of_one_image_size_give_features_of_the_width_they_name(network: nn.Module, shape: tuple) -> None:
    features = network(torch.randn(3, *shape))
    assert features.shape == (3, network.num_features)
    assert features.min() >= 0


def test_weights_start_he_normal() -> None:
    torch.manual_seed(0)
    first, second = (layer.weight for layer in MLP(hidden=(400, 300)).modules() if isinstance(layer, nn.Linear))
    assert first.std().item() == pytest.approx((2 / 784) ** 0.5, rel=0.01)
    assert second.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.01)


def test_shapes_that_leave_no_network_are_refused() -> None:
    with pytest.raises(UserError, match=r"MLP: in_shape=\(1, 28, 28\) and hidden=\(5, 0\)"):
        MLP(hidden=(5, 0))
    with pytest.raises(UserError, match=r"LeNet: in_shape=\(1, 15, 28\) must have at least one channel and 16 x 16"):
        LeNet((1, 15, 28))


def test_small_conv_net_refuses_zero_stages() -> None:
    with pytest.raises(UserError, match="SmallConvNet: in_chans=1, width=32 and stages=0 must each be at least 1"):
        SmallConvNet(stages=0)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # instantiate_classes: the name that all of 4.40+ has
@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ({"class_path": "lightspan.backbones.vision.timm_backbone", "init_args": {"name": "resnet10t"}}, "ResNet"),
        ({"class_path": "lightspan.backbones.vision.SmallConvNet", "init_args": {"width": 4}}, "SmallConvNet"),
    ],
)
def test_yaml_names_a_backbone_by_class_path(spec: dict, kind: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=nn.Module)
    built = parser.instantiate_classes(parser.parse_object({"backbone": spec}))
    assert type(built.backbone).__name__ == kind
