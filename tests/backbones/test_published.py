"""Networks of timm and torchvision whose published weights lie on this disk, and the words where they do not."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from lightspan.backbones import published
from lightspan.backbones.published import timm_published, timm_tokens, timm_vit, torchvision_published
from lightspan.cli.config.build import build
from lightspan.cli.config.resolve import resolve
from lightspan.core.errors import UserError
from lightspan.core.files.foreign import BYTES


def test_what_the_cache_of_hugging_face_holds_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--test_vit.r160_in1k"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    network = timm.create_model("test_vit")
    save_file(network.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = timm_published("test_vit")
    for name, tensor in network.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    features = timm_published("test_vit", outputs=0).state_dict()
    assert network.state_dict().keys() - features.keys() == {"head.weight", "head.bias"}
    assert torch.equal(features["pos_embed"], network.state_dict()["pos_embed"])
    assert timm_published("test_vit", outputs=3).head.out_features == 3


def test_what_the_cache_of_torch_hub_holds_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    network = torchvision.models.squeezenet1_1()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    assert torch.equal(torchvision_published("squeezenet1_1").features[0].weight, network.features[0].weight)


def test_a_vision_transformer_of_timm_has_the_settings_that_its_name_stands_for() -> None:
    with torch.device("meta"):
        clip = timm_vit("vit_base_patch32_clip_quickgelu_224", outputs=512)
        dino = timm_vit("vit_small_patch14_dinov2", image_size=224)
    assert {type(block.mlp.act).__name__ for block in clip.blocks} == {"QuickGELU"}
    assert {part.eps for part in clip.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-5}
    assert {part.eps for part in dino.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-6}
    assert (clip.head.out_features, tuple(dino.pos_embed.shape)) == (512, (1, 257, 384))


def test_a_vision_transformer_of_timm_takes_weights_of_another_image_size_and_behind_a_prefix(tmp_path: Path) -> None:
    stored = timm.create_model("test_vit", num_classes=0).state_dict()  # for 160 pixels in patches of 16
    file = str(tmp_path / "vit.safetensors")
    save_file({f"teacher.{name}": tensor for name, tensor in stored.items()} | {"head.bias": torch.ones(2)}, file)
    same, smaller = (timm_vit("test_vit", file, "teacher.", image_size=size).state_dict() for size in (None, 96))
    positions = resample_abs_pos_embed(stored["pos_embed"], new_size=[6, 6], num_prefix_tokens=1)
    for name, tensor in stored.items():
        assert torch.equal(same[name], tensor)
        assert torch.equal(smaller[name], positions if name == "pos_embed" else tensor)
    with pytest.raises(UserError, match=r"head\.bias is missing; head\.weight is missing"):
        timm_vit("test_vit", file, "teacher.", outputs=3)


def test_without_outputs_the_head_of_a_file_is_left_out_too(tmp_path: Path) -> None:
    whole = timm.create_model("test_vit", num_classes=5).state_dict()
    save_file(whole, file := str(tmp_path / "vit.safetensors"))
    assert torch.equal(timm_vit("test_vit", file).state_dict()["pos_embed"], whole["pos_embed"])
    with pytest.raises(UserError, match=r"head\.bias is \[5\], not \[3\]"):
        timm_vit("test_vit", file, outputs=3)


def test_a_vision_transformer_of_timm_takes_weights_under_the_names_of_their_authors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = timm.create_model("test_vit", num_classes=0).state_dict()
    file = str(tmp_path / "dinov2.safetensors")
    save_file({**ours, "mask_token": torch.ones(1, 64)}, file)  # DINOv2 has one, and timm does not
    assert torch.equal(timm_vit("test_vit", file).state_dict()["pos_embed"], ours["pos_embed"])
    block = {
        **{f"attn.in_proj_{part}": (2304, *more) for part, more in (("weight", (768,)), ("bias", ()))},
        **{f"attn.out_proj.{part}": (768, *more) for part, more in (("weight", (768,)), ("bias", ()))},
        **{f"ln_{i}.{part}": (768,) for i in (1, 2) for part in ("weight", "bias")},
        "mlp.c_fc.weight": (3072, 768),
        "mlp.c_fc.bias": (3072,),
        "mlp.c_proj.weight": (768, 3072),
        "mlp.c_proj.bias": (768,),
    }
    clip = {f"transformer.resblocks.{i}.{name}": shape for i in range(12) for name, shape in block.items()}
    clip |= {f"ln_{place}.{part}": (768,) for place in ("pre", "post") for part in ("weight", "bias")}
    clip |= {"class_embedding": (768,), "positional_embedding": (50, 768)}
    clip |= {"conv1.weight": (768, 3, 32, 32), "proj": (768, 512)}
    with torch.device("meta"):  # names and shapes, without the numbers
        tensors = {f"visual.{name}": torch.empty(shape) for name, shape in clip.items()}
        monkeypatch.setattr(published, "tensors_behind", lambda path, prefix: tensors)
        timm_vit("vit_base_patch32_clip_quickgelu_224", file, outputs=512)
        del tensors["visual.ln_pre.bias"]
        with pytest.raises(UserError, match=r"norm_pre\.bias is missing"):
            timm_vit("vit_base_patch32_clip_quickgelu_224", file, outputs=512)


def test_weights_become_a_backbone_of_tokens_for_images_of_any_whole_patches(tmp_path: Path) -> None:
    stored = timm.create_model("test_vit", num_classes=3)  # for 160 pixels in patches of 16
    save_file(
        {f"teacher.{name}": tensor for name, tensor in stored.state_dict().items()},
        file := str(tmp_path / "v.safetensors"),
    )
    found = timm_tokens("test_vit", file, "teacher.", drop_path=(0.1, 0.1)).eval()
    image = torch.randn(2, 3, 160, 160)
    stored.reset_classifier(0, "token")
    torch.testing.assert_close(found(image), stored.eval()(image))
    torch.testing.assert_close(found.tokens(image), stored.forward_features(image))
    small = torch.randn(1, 3, 96, 32)
    moved = resample_abs_pos_embed(stored.pos_embed, new_size=[6, 2], num_prefix_tokens=1)
    by_hand = stored.patch_embed.proj(small).flatten(2).mT
    by_hand = torch.cat([stored.cls_token, by_hand], dim=1) + moved
    expected = stored.norm(stored.blocks(by_hand))
    torch.testing.assert_close(found.tokens(small), expected, rtol=1e-4, atol=1e-5)
    assert found.mask_token is not None
    assert {block.drop_path1.drop_prob for block in found.feature_modules} == {0.1}


def test_dinov3s_weights_come_under_timms_names_and_their_authors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "vit_small_patch16_dinov3"
    with torch.device("meta"):
        own = timm.create_model(name, num_classes=0).state_dict()
        theirs = {**own, "storage_tokens": own["reg_token"], "mask_token": torch.empty(1, 384)}
        del theirs["reg_token"]
        theirs |= {"rope_embed.periods": torch.empty(16), "local_cls_norm.weight": torch.empty(384)}
        for block in range(12):
            theirs[f"blocks.{block}.ls1.gamma"] = theirs.pop(f"blocks.{block}.gamma_1")
            theirs[f"blocks.{block}.ls2.gamma"] = theirs.pop(f"blocks.{block}.gamma_2")
            theirs[f"blocks.{block}.attn.qkv.bias"] = torch.empty(3 * 384)
            theirs[f"blocks.{block}.attn.qkv.bias_mask"] = torch.empty(3 * 384)
        for tensors in (own, theirs):
            monkeypatch.setattr(published, "tensors_behind", lambda path, prefix, given=tensors: dict(given))
            found = timm_tokens(name, "dinov3.safetensors")
            assert (found.num_prefix_tokens, found.num_features) == (5, 384)
            assert found(torch.empty(1, 3, 112, 64)).shape == (1, 384)
        del theirs["norm.bias"]
        with pytest.raises(UserError, match=r"norm\.bias is missing"):
            timm_tokens(name, "dinov3.safetensors")


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_base_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"]
)
def test_all_of_dinov2s_networks_are_backbones_of_tokens(name: str) -> None:
    with torch.device("meta"):
        found = timm_tokens(name)
        assert found.num_prefix_tokens == 1 + 4 * ("reg4" in name)
        assert found.tokens(torch.empty(1, 3, 98, 98)).shape == (1, found.num_prefix_tokens + 49, found.num_features)


def test_names_without_a_class_token_and_unknown_ones_are_refused() -> None:
    with pytest.raises(UserError, match="timm's vision_transformer and eva has no network named 'resnet18'"):
        timm_tokens("resnet18")
    with torch.device("meta"), pytest.raises(UserError, match="vit_base_patch16_siglip_224 cannot give a class token"):
        timm_tokens("vit_base_patch16_siglip_224")


def test_what_is_no_vision_transformer_of_timm_or_has_no_whole_patches_is_refused() -> None:
    with pytest.raises(UserError, match="timm's vision_transformer has no network named 'resnet18'"):
        timm_vit("resnet18")
    with pytest.raises(UserError, match=r"image_size=100 of test_vit must be a multiple .* 16 pixels"):
        timm_vit("test_vit", image_size=100)


def test_a_recipe_whose_weights_are_not_there_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = "{class_path: lightspan.backbones.published.timm_published, init_args: {name: resnet18, outputs: 0}}"
    resolved = resolve("supervised/linear", [], [f"model.init_args.backbone={spec}"])
    with pytest.raises(UserError, match=r"^supervised/linear does not build: the weights of resnet18 are not[^\n]*$"):
        build(resolved)


def test_weights_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"weights of resnet18 are not on this disk: there is no .*resnet18-.*\.pth"):
        torchvision_published("resnet18")
    with pytest.raises(UserError, match=r"not on this disk: .* has no timm/resnet18.a1_in1k/model.safetensors"):
        timm_published("resnet18")
    with pytest.raises(UserError, match=r"timm has no network named 'resnet18\.mine'; did you mean resnet18"):
        timm_published("resnet18.mine")
    with pytest.raises(UserError, match="torchvision has no network named 'resnet19'; did you mean resnet18"):
        torchvision_published("resnet19")


def test_a_kernel_whose_resampling_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "a.safetensors")
    monkeypatch.setenv(BYTES.setting, str(2**29))
    for kernel in (torch.zeros(1, 1, 150, 150, dtype=torch.uint8), torch.zeros(1)):  # 2 GB, and what has no places
        save_file({"patch_embed.proj.weight": kernel}, path)
        with pytest.raises(UserError, match="timm cannot take the tensors"):
            timm_vit("vit_tiny_patch16_224", path)
