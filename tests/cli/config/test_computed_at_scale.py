"""Recipes at the scale of papers that compute without training, and CoDyRA's, whose figures one of them computes: with
weights and pictures that are random and have the real names and shapes, checked, and run as a whole on a few pictures.
"""

import json
import shutil
from pathlib import Path

import clip_files
import pytest
import timm
import torch
from picture_files import write_pictures
from safetensors.torch import load_file, save_file

from lightspan.cli.main import main


def cached(hub: Path, name: str) -> int:
    """Random weights of a network of timm in the cache of Hugging Face; returns the number of its classes."""
    folder = hub / f"models--timm--{name}"
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    with torch.device("meta"):
        network = timm.create_model(name)
    tensors = {name: torch.randn(x.shape).mul_(0.02).half() for name, x in network.state_dict().items()}
    save_file(tensors, folder / "snapshots/abc/model.safetensors")
    return int(network.num_classes)


def imagenet(hub: Path) -> list[str]:
    """Two of the classes, and timm's ViT-B/16 of DINO, which has no classifier; one part of the labels, in one step."""
    for part in ("train", "val"):
        write_pictures(Path("imagenet", part), {"n01440764": 2, "n01443537": 2})
    assert cached(hub, "vit_base_patch16_224.dino") == 0
    settings = ("epochs=1", "k=2", "rates=[0.1,0.01]", "shares=[0.5]", "tuning_epochs=[1]")
    data = ("num_workers=0", "batch_size=2", "cache_dir=cache")
    return [
        *(f"estimator.init_args.{each}" for each in settings),
        *(f"inputs.subject.init_args.data.init_args.{each}" for each in data),
    ]


def cifar100(hub: Path) -> list[str]:
    """Two of the classes, and timm's ViT-B/16 of ImageNet-21k in the cache of Hugging Face."""
    for part in ("train", "test"):
        write_pictures(Path("cifar100_pictures", part), {"apple": 1, "aquarium_fish": 1})
    assert cached(hub, "vit_base_patch16_224.augreg_in21k") == 21843
    data = "inputs.stream.init_args.data.init_args"
    return [
        *(f"{data}.{setting}" for setting in ("tasks=2", "order=[1,0]", "num_workers=0", "batch_size=2")),
        *(f"{data}.source.init_args.{setting}" for setting in ("num_classes=2", "source.init_args.cache_dir=cache")),
    ]


def eurosat(hub: Path) -> list[str]:
    """Three of the classes, CLIP's ResNet-50 in one file, a small ViT of 16 pixels a patch in a folder."""
    write_pictures(Path("eurosat/train"), {"AnnualCrop": 2, "Forest": 2, "Highway": 2})
    write_pictures(Path("eurosat/test"), {"AnnualCrop": 1, "Forest": 1, "Highway": 1})
    clip_files.save_clip(Path("runs/clip/vit_b16"))
    clip_files.save_tokenizer(Path("runs/clip/tokenizer"))
    few = ["shots=1", "num_workers=0", "batch_size=4", "source.init_args.num_classes=3"]
    few += ["source.init_args.source.init_args.cache_dir=cache", "epochs=2"]
    return [
        "inputs.text.init_args.class_names=[Annual Crop Land,Forest,Highway or Road]",
        *(f"inputs.{part}.init_args.data.init_args.{each}" for part in ("bank", "val", "query") for each in few),
    ]


def of_all_classes(hub: Path) -> list[str]:
    flags = [
        *eurosat(hub),
        *(f"inputs.{part}.init_args.data.init_args.val_size=3" for part in ("bank", "val", "query")),
    ]
    save_file(clip_files.openai_resnet50(), "runs/clip/rn50.safetensors")
    return flags


def of_base_classes(hub: Path) -> list[str]:
    more = ("val_size=2", "train_classes=[0,1]")
    parts = ("bank", "val", "query")
    return [*eurosat(hub), *(f"inputs.{part}.init_args.data.init_args.{each}" for part in parts for each in more)]


def signs(hub: Path) -> list[str]:
    """Two kinds of traffic signs, a ResNet-18 that a run left, and perturbations of a single step."""
    write_pictures(Path("stl10"), {"": 4})
    for part in ("train", "test"):
        write_pictures(Path("gtsrb", part), {"00000": 2, "00001": 2})
    Path("runs/simclr").mkdir(parents=True)
    network = timm.create_model("resnet18", num_classes=0)
    weights = {f"backbone.{name}": x for name, x in network.state_dict().items()}
    save_file(weights, "runs/simclr/model.safetensors")
    settings = "estimator.init_args"
    data = [f"inputs.audited.init_args.{each}.init_args" for each in ("surrogate", "downstream")]
    return [
        *(f"{settings}.{each}" for each in ("steps=1", "hardening_steps=1", "batch_size=2")),
        f"{settings}.perturbations.generated.init_args.rows=2",
        *(f"{each}.{setting}" for each in data for setting in ("num_workers=0", "batch_size=2", "cache_dir=cache")),
    ]


ROWS = {
    "analysis/gda_clip_eurosat": of_all_classes,
    "analysis/gda_clip_new_eurosat": of_base_classes,
    "analysis/imagenet_protocol_vit_b16": imagenet,
    "analysis/nmc_cifar100": cifar100,
    "analysis/universal_perturbation_gtsrb": signs,
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_gives_its_result_with_weights_of_the_real_names_and_shapes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.manual_seed(0)
    flags = ROWS[name](tmp_path / "hub")
    assert main(["check", name, "--fast"]) == 0
    assert main(["run", name, "--run", "computed", "--features", "store", "--device", "cpu", *flags]) == 0
    assert json.loads(Path("computed/result.json").read_text())["figures"]


DOMAINS = {"aircraft": ["707-320", "A310"], "caltech101": ["ant", "sea_horse"], "dtd": ["banded", "dotted"]}
DOMAINS |= {name: ["first", "second"] for name in ("eurosat", "oxford_flowers", "food101", "mnist", "oxford_pets")}
DOMAINS |= {name: ["first", "second"] for name in ("stanford_cars", "sun397")}
SHORT = [
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu", "trainer.logger=null"),
    *("data.init_args.num_workers=0", "data.init_args.batch_size=2", "data.init_args.cache_dir=cache"),
    *(f"trainer.callbacks.{name}=null" for name in ("preemption", "watchdog", "learning_rate", "progress", "ledger")),
]


@pytest.mark.sweep
def test_codyra_goes_from_task_to_task_and_its_figures_are_of_all_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    clip_files.save_clip(Path("runs/clip/vit_b16"))
    for domain, classes in DOMAINS.items():
        for part in ("train", "test"):
            write_pictures(Path("xtail", domain, part), dict.fromkeys(classes, 1))
    assert main(["check", "adaptation/codyra_clip", "--fast"]) == 0
    before, domains = "runs/clip/vit_b16/model.safetensors", list(DOMAINS)
    for domain in domains[:2]:
        flags = [
            f"data.init_args.{name}=xtail/{domain}/{part}"
            for name, part in (("folder", "train"), ("val_folder", "test"))
        ]
        if domain != domains[0]:
            flags.append(f"model.init_args.encoders.init_args.weights={before}")
        assert main(["fit", "adaptation/codyra_clip", "--run", f"runs/codyra/{domain}", *SHORT, *flags]) == 0
        assert main(["export", f"runs/codyra/{domain}", "--to", "safetensors", "--fold"]) == 0
        after = f"runs/codyra/{domain}/export/safetensors/model.safetensors"
        if domain != domains[0]:
            first, second = load_file(before), load_file(after)
            changed = {name for name in first if not torch.equal(first[name], second[name])}
            assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
            assert {name.split(".")[1] for name in changed} == {"image", "text"}
            assert all(name.endswith("weight") for name in changed)
        before = after
    for domain in domains[2:]:
        shutil.copytree(f"runs/codyra/{domains[1]}/export", f"runs/codyra/{domain}/export")
    cached = [f"inputs.stages.init_args.domains.{name}.init_args.cache_dir=cache" for name in domains]
    cached += [f"inputs.stages.init_args.domains.{name}.init_args.num_workers=0" for name in domains]
    assert main(["run", "analysis/xtail_clip", "--run", "out", "--features", "store", "--device", "cpu", *cached]) == 0
    figures = {each["name"]: each["value"] for each in json.loads(Path("out/result.json").read_text())["figures"]}
    assert figures.keys() == {"last", "average", "transfer", "domains"}
    assert figures["domains"] == 10
