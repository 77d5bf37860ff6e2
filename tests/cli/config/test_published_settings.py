"""Settings of recipes at the scale of papers that only a reader of their authors' code can tell from others."""

import pytest

from lightspan.cli.config.merge import merge_layers
from lightspan.cli.config.recipes import load
from lightspan.cli.config.tree import plain

SETTINGS = {
    # "Understanding and Mitigating the Label Noise ...", the authors' `timm_load`, and ImageNet's statistics
    "robustness/nmtune_pets": {
        "data.init_args.views.init_args.scale": [0.8, 1.0],
        "data.init_args.mean": [0.485, 0.456, 0.406],
        "data.init_args.std": [0.229, 0.224, 0.225],
        "data.init_args.val_folder": "oxford_pets/val",
    },
    # fredzzhang/atlas, src/learn_task_addition.py: 128 images of 8 tasks a step, 20 passes of DTD's 376
    "merging/atlas_clip": {
        "data.init_args.batch_size": 128 // 8,
        "trainer.max_steps": 20 * -(-376 // 16),
        "model.init_args.optimizer.init_args": {"lr": 1e-3, "weight_decay": 0.1},
    },
    # facebookresearch/SIE, main.py
    "contrastive/sie_3diebench": {
        "data.init_args.mean": [0.5016, 0.5037, 0.5060],
        "data.init_args.std": [0.1030, 0.0999, 0.0969],
    },
    # "Mixup Your Own Pairs", appendix: a tenth of the rate from epoch 80 of 100
    "contrastive/supremix_agedb": {
        "model.init_args.lr_scheduler.class_path": "lightspan.optim.schedules.Staircase",
        "model.init_args.lr_scheduler.init_args": {"at": [80 / 100]},
    },
    # PixDeep/MHS-VM, configs/config_setting.py: T_max = 50 of 300 epochs down to 1e-5
    "supervised/mhs_vm_isic": {
        "data.init_args.batch_size": 32,
        "data.init_args.sides": [256, 256],
        "trainer.max_epochs": 300,
        "model.init_args.backbone.init_args": {"threshold": 0.0},
        "model.init_args.optimizer.init_args": {"lr": 1e-3, "weight_decay": 1e-2},
        "model.init_args.lr_scheduler.init_args": {"warmup": 0.0, "final": 1e-5 / 1e-3, "covered": 300 / 50},
    },
    # "SSVI", the authors' CIFAR-10
    "bayesian/ssvi_cifar10": {"data.init_args.std": [0.2023, 0.1994, 0.2010]},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_recipe_has_the_settings_of_its_authors_code(name: str) -> None:
    config = plain(merge_layers(load(name).layers)[0])
    for path, expected in SETTINGS[name].items():
        found = config
        for key in path.split("."):
            found = found[key]
        assert found == expected, path


@pytest.mark.parametrize(("name", "steps"), [("masked/spt_lra_image", 2_500), ("supervised/sequence_lra_image", 2_000)])
def test_warm_ups_of_long_range_arena_take_the_authors_steps(name: str, steps: int) -> None:
    """ "Never Train from Scratch", the authors' transformer-lra-cifar*.yaml."""
    config = plain(merge_layers(load(name).layers)[0])
    warmup = config["model"]["init_args"]["lr_scheduler"]["init_args"]["warmup"]
    assert warmup * config["trainer"]["max_steps"] == pytest.approx(steps, abs=5)
