"""Memorised neurons of diffusion methods, and of any network with feed-forward layers; and what an attack gets."""

import itertools
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from stable_diffusion_files import write_stable_diffusion
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightspan.backbones.diffusion import DiT
from lightspan.cli.main import main
from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.weights.memorisation import ExtractionAttack, MemorisedNeurons, prune
from lightspan.evaluation.weights.prompts import DrawnImages, Prompts, Samples
from lightspan.methods.generative.denoising_diffusion import DenoisingDiffusion

SHAPE = (1, 4, 4)


def diffusion(seed: int = 0) -> DenoisingDiffusion:
    """A network of one block that is no identity, as it would be before training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DiT(image_size=4, width=32, depth=1, num_classes=4)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
        return DenoisingDiffusion(network, optimizer=partial(torch.optim.SGD, lr=0.1), levels=20).eval()


def drawn(*labels: int, **settings: Any) -> DrawnImages:
    return DrawnImages(list(labels), SHAPE, **{"draws": 2, "steps": 6, "first": 3, **settings})


def test_the_base_as_target_gives_an_empty_mask() -> None:
    result = MemorisedNeurons(share=0.1).fit(diffusion(), drawn(0, 1), drawn(0, 1))
    assert result.pruned == 0
    assert result.tensors["backbone.blocks.0.mlp.fc2.weight"].all()


def test_a_mask_names_parameters_and_prunes_their_entries() -> None:
    method = diffusion()
    result = MemorisedNeurons(share=0.1).fit(method, drawn(0, 1), drawn(4), other=drawn(2))
    (name, keep), *none = result.tensors.items()
    assert not none
    assert name in method.state_dict()
    assert keep.dtype == torch.bool
    assert result.pruned == int((~keep).sum()) > 0
    assert result.density == pytest.approx(result.pruned / keep.numel())
    prune(method, result.tensors)
    assert (method.state_dict()[name][~keep] == 0).all()
    assert result.iou is not None
    assert result.layers[0]["iou"] == result.iou > 0


def test_a_union_over_steps_grows_with_them_and_a_vote_takes_from_it() -> None:
    method, base = diffusion(), partial(drawn, 4)
    masks = [
        MemorisedNeurons(share=0.1, vote=vote).fit(method, drawn(0, first=first), base(first=first)).tensors
        for first, vote in ((1, 0.0), (6, 0.0), (6, 0.5))
    ]
    one, union, vote = (next(iter(mask.values())) for mask in masks)
    assert (~one & union).sum() == 0
    assert (~union).sum() > (~one).sum()
    assert (~vote & union).sum() == 0
    assert (~vote).sum() < (~union).sum()


def test_the_first_steps_are_those_of_whole_images() -> None:
    method = diffusion()
    with torch.no_grad():
        steps = list(method.draw(torch.tensor([1, 2]), SHAPE, steps=6, seed=3))
    assert torch.equal(steps[-1], method.sample(torch.tensor([1, 2]), SHAPE, steps=6, seed=3))
    label, images = DrawnImages([1, 2], SHAPE, steps=6, first=2, seed=3).images(method)
    assert torch.equal(images, steps[-1])
    assert label.tolist() == [1, 2]
    seen: list[int] = []
    drawn(0, 1, batch_size=3).run(method, seen.append)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_running_leaves_modes_and_weights_as_they_were() -> None:
    method = diffusion().train()
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    MemorisedNeurons(share=0.1).fit(method, drawn(0), drawn(4))
    assert all(module.training for module in method.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert not any(module._forward_pre_hooks for module in method.modules())


class Given(Prompts):
    """Arguments of a network, by name."""

    def __init__(self, **arguments: Tensor) -> None:
        self.arguments = arguments

    def run(self, network: nn.Module, entering: Any) -> None:
        entering(0)
        network(**self.arguments)


def test_networks_of_timm_and_transformers_are_matched_by_name() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model("test_vit", num_classes=0)
        settings = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 128}
        bert = BertModel(BertConfig(**settings, vocab_size=20, max_position_embeddings=8))
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    of_timm = MemorisedNeurons(["blocks.*.mlp.fc2"], share=0.05).fit(vit, Given(x=x[:1]), Given(x=x[1:]))
    assert of_timm.tensors.keys() <= vit.state_dict().keys()
    assert all(row["pruned"] > 0 for row in of_timm.layers)
    words = torch.arange(16).view(2, 8)
    match = ["encoder.layer.?.output.dense"]  # `*` crosses dots and would take the attention's too
    found = MemorisedNeurons(match, share=0.05).fit(bert, Given(input_ids=words[:1]), Given(input_ids=words[1:]))
    assert [row["name"] for row in found.layers] == [f"encoder.layer.{i}.output.dense" for i in (0, 1)]


def test_samples_of_some_labels_are_run_in_one_step() -> None:
    class Counting(nn.Module):
        seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            return x

    steps: list[int] = []
    data, counting = Digits(batch_size=500), Counting()
    Samples(data, split="val", labels=[3, 4]).run(counting, steps.append)
    labels = torch.cat([batch["label"] for batch in data.val_dataloader()])
    assert counting.seen == int(((labels == 3) | (labels == 4)).sum())
    assert set(steps) == {0}
    with pytest.raises(UserError, match=r"no sample of Digits has one of the labels \[77\]"):
        Samples(data, labels=[77]).run(counting, steps.append)
    with pytest.raises(UserError, match="a batch has no 'tokens'"):
        Samples(data, field="tokens").run(counting, steps.append)


def test_an_attack_counts_what_comes_out_near_the_image_of_its_prompt() -> None:
    class Painter(nn.Module):
        def draw(self, label: Tensor, *rest: Any, **named: Any) -> Any:
            yield torch.stack([torch.full(SHAPE, float(one)) for one in label])

    images = Features(torch.tensor([0.1, 1.0, 7.0, 2.0])[:, None].expand(4, 16), torch.tensor([0, 1, 1, 2]))
    prompts = DrawnImages([0, 1, 2], SHAPE, draws=3, steps=1, first=1)
    result = ExtractionAttack(radius=0.05).fit(Painter(), prompts, images)
    assert (result.copies, result.drawn, result.prompts) == (6, 9, 3)
    assert result.rate == pytest.approx(2 / 3)
    assert result.distances[0] == 0
    assert result.distances[-1] == pytest.approx(0.1)
    assert ExtractionAttack(radius=0.2).fit(Painter(), prompts, images).rate == 1
    with pytest.raises(UserError, match=r"there is no image for the prompts \[5\]"):
        ExtractionAttack().fit(Painter(), DrawnImages([0, 5], SHAPE, steps=1, first=1), images)
    with pytest.raises(UserError, match="9 numbers an image, and 16 are drawn"):
        ExtractionAttack().fit(Painter(), prompts, Features(torch.zeros(4, 9), images.label_N))


def test_what_cannot_be_located_is_named() -> None:
    method = diffusion()
    with pytest.raises(UserError, match=r"pattern '\*\.mlp\.fc3' matches no linear layer of DenoisingDiffusion"):
        MemorisedNeurons(["*.mlp.fc3"]).fit(method, drawn(0), drawn(1))
    with pytest.raises(UserError, match=r"share=0\.001 of the 128 columns of .*fc2 is less than one; give 0\.00781"):
        MemorisedNeurons(share=0.001).fit(method, drawn(0), drawn(1))
    with pytest.raises(UserError, match="in 3 steps of memorised prompts and 2 of base ones; run both for as many"):
        MemorisedNeurons(share=0.1).fit(method, drawn(0), drawn(1, first=2))
    with pytest.raises(UserError, match="labels go to 9, and the network knows 4 classes"):
        MemorisedNeurons(share=0.1).fit(method, drawn(9), drawn(1))
    with pytest.raises(UserError, match="DrawnImages runs diffusion methods, which have `draw`, and DiT is none"):
        MemorisedNeurons(share=0.1).fit(method.backbone, drawn(0), drawn(1))
    rest = nn.ModuleDict({"spare": nn.Linear(20, 2)})
    rest.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"the base prompts do not reach spare; match layers"):
        MemorisedNeurons(["spare"], share=0.1).fit(rest, Given(x=torch.ones(1)), Given(x=torch.ones(1)))
    with torch.no_grad():
        method.backbone.blocks[0].mlp.fc1.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"base prompts give NaN or infinite numbers in backbone\.blocks\.0\.mlp\.fc2"):
        MemorisedNeurons(share=0.1).fit(method, drawn(0), drawn(1))
    for wrong in ({"labels": []}, {"labels": [-1]}, {"labels": [0], "first": 60}, {"labels": [0], "draws": 0}):
        with pytest.raises(UserError, match="DrawnImages"):
            DrawnImages(**{"shape": SHAPE, **wrong})


def test_recipes_locate_prune_and_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTSPAN_RUN", "")
    weights = Path("runs/memorised/export/safetensors/model.safetensors")
    weights.parent.mkdir(parents=True)
    network = DiT(image_size=8, num_classes=30)
    save_file({f"backbone.{name}": tensor for name, tensor in network.state_dict().items()}, weights)
    few = ["inputs.target.init_args.draws=1", "inputs.base.init_args.draws=1", "inputs.other.init_args.draws=1"]
    assert main(["run", "analysis/memorised_neurons", "--run", "runs/neurons", *few]) == 0
    masks = load_file("runs/neurons/result.safetensors")
    assert all(mask.dtype == torch.bool for mask in masks.values())
    assert main(["run", "merging/prune_memorised", "--run", "runs/pruned"]) == 0
    pruned = load_file("runs/pruned/merged.safetensors")
    for name, mask in masks.items():
        assert (pruned[name][~mask] == 0).all()
    few = ["draws=1", "steps=2", "first=1"]
    prompts = [*(f"inputs.prompts.init_args.{one}" for one in few), "inputs.images.init_args.data.init_args.times=1"]
    assert main(["run", "analysis/extraction_attack", "--run", "runs/attack", "--features", "store", *prompts]) == 0
    assert json.loads(Path("runs/attack/result.json").read_text())["fields"]["prompts"] == 10


def test_the_recipes_of_stable_diffusion_locate_and_prune_in_a_folder_of_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTSPAN_RUN", "")
    folder = write_stable_diffusion(Path("stable-diffusion-v1-5"))
    letters = itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2)
    Path("memorised.txt").write_text("\n".join(" ".join(pair) for pair in itertools.islice(letters, 500)))
    small = [
        f"inputs.{group}.init_args.{setting}"
        for group in ("target", "base", "other")
        for setting in ("shape=[4, 8, 8]", "batch_size=10", "steps=4", "first=2")
    ]
    assert main(["run", "analysis/memorised_stable_diffusion", "--run", "runs/sd_neurons", *small]) == 0
    masks = load_file("runs/sd_neurons/result.safetensors")
    assert len(masks) == 4  # of blocks down, in the middle, and two up
    assert main(["run", "merging/prune_stable_diffusion", "--run", "runs/sd_pruned"]) == 0
    before = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    pruned = load_file("runs/sd_pruned/merged.safetensors")
    assert pruned.keys() == before.keys()
    gone = 0
    for name, tensor in before.items():
        keep = masks.get(f"backbone.unet.{name}", torch.ones_like(tensor, dtype=torch.bool))
        gone += int((~keep).sum())
        assert torch.equal(pruned[name], torch.where(keep, tensor, 0))
    assert gone > 0
    shutil.copy("runs/sd_pruned/merged.safetensors", folder / "unet/diffusion_pytorch_model.safetensors")
    diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
