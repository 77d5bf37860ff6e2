"""Recipes at the scale of papers, with weights and data that are random and have the real names and shapes: checked,
planned, and trained for a step.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from dit_files import published
from picture_files import write_pictures
from safetensors.torch import save_file, save_model
from shard_files import write_shard
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaForMaskedLM

from lightspan.backbones.denoisers import EncoderDecoder
from lightspan.backbones.language import llama, t5
from lightspan.backbones.sequence import sequence_transformer
from lightspan.backbones.trained_tokenizers import trained_tokenizer
from lightspan.cli import main

SHORT = [
    *("trainer.max_steps=1", "trainer.accelerator=cpu", "trainer.precision=null", "trainer.logger=null"),
    *("trainer.limit_val_batches=0", "trainer.callbacks=null", "trainer.enable_progress_bar=false"),
    *("data.init_args.num_workers=0", "data.init_args.batch_size=2"),
]


HEADS = {"projector": [64, 64], "predictor": [64]}
"""Narrower heads of SoftCon, which no file of weights has."""


def dinov2() -> list[str]:
    """DINOv2's ViT-S/14 as it is published, for 518 pixels, and two places of SSL4EO-S12-ML."""
    with torch.device("meta"):
        network = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    tensors = {name: torch.randn(x.shape).mul_(0.02).half() for name, x in network.state_dict().items()}
    assert tensors["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    save_file({**tensors, "mask_token": torch.zeros(1, 384)}, "dinov2_vits14.safetensors")
    with tarfile.open("places.tar", "w") as archive:
        for place in range(4):
            seasons = np.random.default_rng(place).integers(1, 9000, (2, 13, 40, 40)).astype(np.uint16)
            add(archive, f"{place}.npy", seasons)
            add(archive, f"{place}.json", {"present": [place, 8]})
    return [
        "data.init_args.shards=[places.tar]",
        *(f"model.init_args.{part}.init_args.hidden={widths}" for part, widths in HEADS.items()),
    ]


def add(archive: tarfile.TarFile, name: str, value: Any) -> None:
    content = io.BytesIO()
    if isinstance(value, np.ndarray):
        np.save(content, value)
    else:
        content.write(json.dumps(value).encode())
    member = tarfile.TarInfo(name)
    member.size = len(content.getvalue())
    archive.addfile(member, io.BytesIO(content.getvalue()))


def exported(network: nn.Module, run: str) -> None:
    folder = Path("runs", run, "export/safetensors")
    folder.mkdir(parents=True)
    save_model(nn.ModuleDict({"backbone": network}), str(folder / "model.safetensors"))


def t5_1_1() -> list[str]:
    """A small T5 with what 1.1 has, and a run of the first stage, which changed all of it."""
    network = t5(32128, 16, 1, heads=2, mlp_width=24, tied=False)
    network.save_pretrained("runs/t5")
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    exported(EncoderDecoder(network), "cpt_amazon")
    return [
        "data.init_args.domains={class_path: lightspan.datamodules.text.drawn_reviews.DrawnReviews}",
        "data.init_args.tokenizer={class_path: lightspan.backbones.tokenizers.HashedWords, init_args: {size: 32000}}",
        "data.init_args.length=16",
    ]


def clip() -> list[str]:
    """A small transformer's names in the place of ViT-B/32's, and heads of the real shapes."""
    network = timm.create_model("test_vit", num_classes=512, img_size=224)
    sets = {"sun397": 397, "cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47}
    Path("runs/clip/heads").mkdir(parents=True)
    tensors: dict[str, Tensor] = {f"backbone.{name}": tensor for name, tensor in network.state_dict().items()}
    for task in ("base", *sets):
        changed = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in tensors.items()}
        save_file(changed, f"runs/clip/{task}.safetensors")
    for task, classes in sets.items():
        directions = nn.functional.normalize(torch.randn(classes, 512), dim=1)
        save_file({"head.weight": 100 * directions}, f"runs/clip/heads/{task}.safetensors")
    blank = "lightspan.datamodules.images.blank.Blank"
    return [
        *("model.init_args.backbone.init_args.name=test_vit", "model.init_args.backbone.init_args.image_size=224"),
        *(
            f"data.init_args.tasks.{task}={{class_path: {blank}, init_args: {{classes: {n}, size: 8, val_size: 4}}}}"
            for task, n in sets.items()
        ),
    ]


def long_range_arena() -> list[str]:
    """A few of LRA's sequences, and a run of the first stage."""
    Path("lra_image").mkdir()
    for seed, part in enumerate(("train", "test")):
        sequences = np.random.default_rng(seed).integers(256, size=(40, 1024)).astype(np.uint8)
        np.savez(f"lra_image/{part}.npz", sequences=sequences, labels=np.arange(40) % 10)
    exported(sequence_transformer(width=64, depth=3, heads=4, mlp_width=128), "spt_lra_image")
    return ["data.init_args.val_size=20"]


def dit_xl() -> list[str]:
    """One of DiT-XL/2's blocks, and latents of four pictures in each of two shards."""
    tensors = published(side=32, chans=4, width=1152, depth=1, classes=1000)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, "dit_xl_2_256.safetensors")
    for shard in range(2):
        with tarfile.open(f"{shard}.tar", "w") as archive:
            for number in range(4):
                moments = np.random.default_rng(number).normal(size=(8, 32, 32)).astype(np.float16)
                add(archive, f"{number}.npy", moments)
    return ["model.init_args.backbone.init_args.network.init_args.depth=1", "data.init_args.shards=[0.tar, 1.tar]"]


def deit() -> list[str]:
    """One block of DeiT-B under timm's names."""
    with torch.device("meta"):
        shapes = timm.create_model("deit_base_patch16_224.fb_in1k").state_dict()
    kept = {name: each.shape for name, each in shapes.items() if "blocks." not in name or name.startswith("blocks.0.")}
    names = {name: name if name.startswith("head.") else f"backbone.{name}" for name in kept}
    Path("runs").mkdir()
    save_file({names[name]: torch.randn(shape).mul_(0.02) for name, shape in kept.items()}, "runs/deit_b.safetensors")
    shard = write_shard(Path("0.tar"), range(4))
    return [f"data.init_args.shards=[{shard}]", "model.init_args.backbone.init_args.module.init_args.depth=1"]


def pets() -> list[str]:
    for part in ("train", "val"):
        write_pictures(Path("oxford_pets", part), {f"breed{number:02}": 1 for number in range(37)})
    return ["data.init_args.cache_dir=cache"]


def tokenizer(folder: str, text: str) -> int:
    """A small one of bytes, as transformers saves it; how many numbers it has."""
    made = trained_tokenizer([text], 300)
    made.save_pretrained(folder)
    return len(made)


def lines(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("\n".join(map(json.dumps, rows)))


def mrpc() -> list[str]:
    """GLUE's MRPC as `datasets` writes it, and small RoBERTas with the head that they were pretrained with."""
    for part in ("train", "validation"):
        rows = [{"sentence1": f"{n} is", "sentence2": f"is {n}", "label": n % 2, "idx": n} for n in range(6)]
        lines(f"mrpc/{part}.jsonl", rows)
    for folder in ("runs/roberta_base", "runs/roberta_large"):
        vocab_size = tokenizer(folder, "what is one?")
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        RobertaForMaskedLM(RobertaConfig(vocab_size=vocab_size, **sizes)).save_pretrained(folder)
    return []


def commonsense() -> list[str]:
    """Questions with answers, and a small Llama."""
    lines("commonsense/train.jsonl", [{"prompt": f"is {n} even?", "completion": str(n % 2 == 0)} for n in range(9)])
    llama(tokenizer("runs/llama", "is it?"), 32, 1, 2, 32, 256).save_pretrained("runs/llama")
    return ["data.init_args.val_size=3"]


ROWS = {
    "adaptation/flora_commonsense": commonsense,
    "adaptation/svfit_mrpc": mrpc,
    "compression/pela_imagenet": deit,
    "contrastive/softcon_ssl4eo": dinov2,
    "generative/diffscaler_ffhq": dit_xl,
    "language/uda_amazon": t5_1_1,
    "masked/spt_lra_image": long_range_arena,
    "merging/atlas_clip": clip,
    "robustness/nmtune_pets": pets,
    "subspace/said_mrpc": mrpc,
    "supervised/sequence_lra_image": long_range_arena,
}


UNPLANNED = {"merging/atlas_clip", "robustness/nmtune_pets"}
"""A plan takes more than the step; tests/methods/merging has one of the first, with a smaller network."""


@pytest.mark.sweep
@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_is_planned_and_takes_a_step_with_weights_of_the_real_names_and_shapes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    flags = [*SHORT, *ROWS[name]()]
    assert main(["check", name, "--fast"]) == 0
    if name not in UNPLANNED:
        assert main(["plan", name, *flags]) == 0
    assert main(["fit", name, *flags]) == 0
