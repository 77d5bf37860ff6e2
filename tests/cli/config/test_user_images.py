"""`--images FOLDER`: what of a recipe follows from the user's pictures, and what stays."""

from pathlib import Path
from typing import Any

import pytest
from picture_files import write_pictures

from lightspan.cli.config import user_folders, user_images
from lightspan.cli.config.resolve import Resolved, resolve
from lightspan.cli.config.user_folders import workers
from lightspan.cli.config.user_images import with_images
from lightspan.core.errors import UserError

VIT = "lightspan.backbones.elastic.ElasticViT"
VIEWS = "lightspan.datamodules.image.augment.views"


def with_folder(recipe: str, folder: Path, size: int = 64, *flags: str, overlays: tuple[str, ...] = ()) -> Resolved:
    return with_images(recipe, overlays, folder, size, flags)


def settings(resolved: Resolved, *path: str) -> Any:
    value: Any = resolved.config
    for key in path:
        value = value[key]
    return value["init_args"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "in", {"cat": 4, "bird": 4})


def test_the_folder_replaces_the_data_and_nothing_else(folder: Path) -> None:
    recipe = "contrastive/barlow_twins"
    before, after = resolve(recipe), with_folder(recipe, folder)
    data = settings(after, "data")
    assert after.config["data"]["class_path"] == user_images.DATA
    assert (data["folder"], data["size"]) == (str(folder), 64)
    assert data["views"]["class_path"] == f"{VIEWS}.TwoViews"
    assert settings(after, "model", "init_args", "backbone") == {"in_chans": 3, "width": 16, "stages": 4}
    for key in ("projector", "optimizer", "lr_scheduler", "normalize"):
        assert after.config["model"]["init_args"][key] == before.config["model"]["init_args"][key]
    kept = before.config["trainer"]["callbacks"]
    assert all(after.config["trainer"]["callbacks"][name]["class_path"] == kept[name]["class_path"] for name in kept)


def test_the_description_tells_of_the_folder_and_not_of_the_recipes_pictures(folder: Path) -> None:
    recipe = "contrastive/simclr"
    before, after = resolve(recipe).about, with_folder(recipe, folder, 64, "seed_everything=1").about
    assert after["title"] == f"contrastive/simclr on the pictures of {folder.name}"
    assert after["expected"] == after["time"] == "not measured on these pictures"
    assert (after["paper"], list(after)) == (before["paper"], list(before))


def test_an_overlay_reaches_the_data_of_the_folder_as_it_would_those_of_the_recipe(folder: Path) -> None:
    overlay, mine = folder.parent / "mine.yaml", folder.parent / "last.yaml"
    overlay.write_text(
        "data: {init_args: {batch_size: 4, val_share: 0.25, skip_damaged: true, num_workers: 0, fit: pad}}\n"
    )
    mine.write_text("data: {init_args: {val_share: 0.5}}\n")
    overlays = (str(overlay), str(mine))
    found = with_folder("contrastive/simclr", folder, 64, "data.init_args.fit=crop", overlays=overlays)
    data = settings(found, "data")
    assert (data["folder"], data["batch_size"], data["num_workers"]) == (str(folder), 4, 0)
    assert (data["val_share"], data["skip_damaged"], data["fit"]) == (0.5, True, "crop")
    assert found.sources["data.init_args.val_share"] == f"{mine}:1"
    assert found.sources["data.init_args.size"] == "--images"


def test_a_setting_that_only_the_recipes_data_have_is_said_to_be_dropped(folder: Path) -> None:
    overlay = folder.parent / "mine.yaml"
    overlay.write_text("data: {init_args: {val_size: 500}}\n")
    found = with_folder("contrastive/simclr", folder, overlays=(str(overlay),))
    assert "val_size" not in settings(found, "data")
    assert any(note.startswith(f"{overlay}:1 data.init_args.val_size: dropped") for note in found.notes)


def test_a_setting_that_neither_the_recipes_data_nor_the_folder_know_is_named_with_its_line(folder: Path) -> None:
    overlay = folder.parent / "mine.yaml"
    overlay.write_text("data:\n  init_args:\n    batchsize: 4\n")
    with pytest.raises(UserError, match=r"mine.yaml:3.*batchsize"):
        with_folder("contrastive/simclr", folder, overlays=(str(overlay),))


def test_flags_win_over_what_the_folder_sets(folder: Path) -> None:
    flags = ("data.init_args.batch_size=2", "data.init_args.fit=pad", "trainer.callbacks.feature_pictures=null")
    found = with_folder("contrastive/barlow_twins", folder, 64, *flags)
    assert (settings(found, "data")["batch_size"], settings(found, "data")["fit"]) == (2, "pad")
    assert "feature_pictures" not in found.config["trainer"]["callbacks"]


def test_every_change_is_said_once(folder: Path) -> None:
    notes = with_folder("contrastive/barlow_twins", folder).notes
    assert notes == [
        f"--images: 8 picture files in {folder}, read at 64 x 64 pixels",
        "model.init_args.backbone.init_args.in_chans=3",
        "the recipe's pictures were grey: the views also change saturation and hue, and drop colours",
        "data.init_args.batch_size=4, since there are few pictures",
    ]


def test_colours_change_only_where_a_grey_recipe_left_them(folder: Path) -> None:
    views = settings(with_folder("contrastive/barlow_twins", folder), "data", "init_args", "views")
    assert views == user_images.COLOUR
    at_scale = settings(with_folder("contrastive/hydra_imagenet", folder), "data", "init_args", "views")
    before = settings(resolve("contrastive/hydra_imagenet"), "data", "init_args", "views")
    assert at_scale == {**before, "size": 64}


def test_crops_and_patches_keep_their_proportion_and_remain_whole(folder: Path) -> None:
    found = with_folder("distillation/poa", folder)
    vit = settings(found, "model", "init_args", "backbone")
    assert (vit["img_size"], vit["patch_size"], vit["in_chans"]) == (64, 16, 3)
    large, small = settings(found, "data", "init_args", "views")["parts"]
    assert "size" not in large["init_args"]
    assert small["init_args"]["size"] == 32


def test_masks_of_whole_patches_stay_so(folder: Path) -> None:
    vit = settings(found := with_folder("masked/sit", folder), "model", "init_args", "backbone")
    corruption = settings(found, "model", "init_args", "corruption")
    aligned = [corruption[name]["init_args"]["align"] for name in ("masks", "alien_masks")]
    assert aligned == [vit["patch_size"]] * 2 == [8, 8]


def test_what_stands_side_by_side_in_a_batch_stays_and_the_batch_has_as_many_as_there_are(tmp_path: Path) -> None:
    many = write_pictures(tmp_path / "many", {f"person {i}": 3 for i in range(30)})
    data = settings(with_folder("distillation/cion", many), "data")
    assert (data["batch_size"], data["groups"]) == (48, {"sizes": [2, 4], "from_epochs": [0, 10]})
    few = with_folder("distillation/cion", write_pictures(tmp_path / "few", {f"person {i}": 20 for i in range(7)}))
    assert settings(few, "data")["batch_size"] == 12  # of 7 people 14 pictures in twos, and a multiple of 4
    assert "data.init_args.batch_size=12, as there are 7 classes to draw it from" in few.notes
    adsl = settings(with_folder("supervised/adsl", many), "data")
    assert (adsl["batch_size"], adsl["per_class"]) == (64, 8)
    with pytest.raises(UserError, match=r"distillation/cion learns from labels, but .* has none"):
        with_folder("distillation/cion", write_pictures(tmp_path / "flat", {"": 50}))


def test_probes_of_what_a_folder_does_not_have_give_way_to_those_of_classes(folder: Path) -> None:
    callbacks = with_folder("distillation/cion", folder).config["trainer"]["callbacks"]
    assert "probes" not in callbacks
    assert list(callbacks["class_probes"]["init_args"]["probes"]) == ["knn", "linear"]


def test_classes_become_the_networks_and_without_them_it_is_refused(folder: Path, tmp_path: Path) -> None:
    found = with_folder("masks/concrete_fashion", folder)
    assert found.config["model"]["init_args"]["num_classes"] == 2
    backbone = settings(found, "model", "init_args", "backbone")
    assert backbone["in_shape"] == [3, 64, 64]
    with pytest.raises(UserError, match=r"learns from labels, but .* has none; put the pictures of each class"):
        with_folder("masks/concrete_fashion", write_pictures(tmp_path / "flat", {"": 3}))


def test_probes_come_with_labels_and_go_without(folder: Path, tmp_path: Path) -> None:
    flat = write_pictures(tmp_path / "flat", {"": 8})
    labelled = with_folder("contrastive/barlow_twins", folder).config["trainer"]["callbacks"]
    assert labelled["probes"]["init_args"]["probes"]["knn"]["init_args"] == {"k": 4}
    unlabelled = with_folder("contrastive/barlow_twins", flat)
    assert "probes" not in unlabelled.config["trainer"]["callbacks"]
    assert any("trainer.callbacks.probes" in note for note in unlabelled.notes)
    added = with_folder("contrastive/hydra_imagenet", folder).config["trainer"]["callbacks"]
    assert added["probes"]["init_args"] == {**labelled["probes"]["init_args"], "every_n_epochs": 10}
    for callbacks in (labelled, added):
        assert callbacks["first_batch"]["init_args"] == {"folder": "${run}/pictures"}


def test_train_and_validation_folders_are_no_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", {"train/a": 2, "train/b": 2, "validation/a": 1, "validation/b": 1})
    data = settings(with_folder("contrastive/barlow_twins", tmp_path / "in"), "data")
    assert data["folder"] == str(tmp_path / "in" / "train")
    assert data["val_folder"] == str(tmp_path / "in" / "validation")


def test_a_train_or_validation_folder_that_is_a_link_out_is_not_followed(tmp_path: Path) -> None:
    for number, names in enumerate((("train", "val"), ("val", "train"))):
        inside, outside = tmp_path / f"in{number}", tmp_path / f"out{number}"
        for place, name in zip((inside, outside), names, strict=True):
            write_pictures(place, {f"{name}/a": 2, f"{name}/b": 2})
        (inside / names[1]).symlink_to(outside / names[1])
        with pytest.raises(UserError, match=f"{names[1]} is a link that leads out") as refused:
            with_folder("contrastive/barlow_twins", inside)
        places = {name: str(place / name) for place, name in zip((inside, outside), names, strict=True)}
        flag = f"data.init_args.val_folder={places['val']}"
        assert str(refused.value).endswith(f"name {places['train']} instead of {inside}, with {flag}")
        found = with_images("contrastive/barlow_twins", (), Path(places["train"]), 32, [flag])
        assert [settings(found, "data")[name] for name in ("folder", "val_folder")] == [places["train"], places["val"]]


def test_what_cannot_be_is_refused_before_anything_is_built(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="language/quickstart is a recipe for data of modality text; name data"):
        with_folder("language/quickstart", folder)
    with pytest.raises(UserError, match="--image-size 0 must be at least 1 pixel"):
        with_folder("contrastive/barlow_twins", folder, 0)
    with pytest.raises(UserError, match="none does not exist"):
        with_folder("contrastive/barlow_twins", tmp_path / "none")


def test_workers_leave_half_of_the_cores_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, count in ((1, 0), (2, 1), (8, 4), (64, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        assert workers() == count


def test_a_method_without_features_has_neither_probes_nor_a_map_and_draws_all_classes(
    folder: Path, tmp_path: Path
) -> None:
    found = with_folder("generative/diffusion_shapes", folder)
    network = settings(found, "model", "init_args", "backbone")
    # Of 28 pixels in patches of 7, whatever else has a `size` in its data.
    assert network == {"image_size": 64, "patch_size": 16, "num_classes": 2, "in_chans": 3}
    callbacks = found.config["trainer"]["callbacks"]
    assert {"probes", "feature_pictures", "reconstructions"}.isdisjoint(callbacks)
    assert (callbacks["pictures"]["init_args"]["shape"], callbacks["pictures"]["init_args"]["classes"]) == (None, None)
    flat = with_folder("generative/diffusion_shapes", write_pictures(tmp_path / "flat", {"": 8}))
    assert settings(flat, "model", "init_args", "backbone")["num_classes"] == 0


def test_guesses_are_drawn_of_methods_that_make_them(folder: Path) -> None:
    drawn = {
        name: with_folder(name, folder).config["trainer"]["callbacks"].get("reconstructions")
        for name in ("masked/mae", "masked/cae", "masked/cropmae", "masked/i_jepa")
    }
    spec = {"class_path": user_folders.RECONSTRUCTIONS, "init_args": {"folder": "${run}/pictures"}}
    assert drawn == {"masked/mae": spec, "masked/cae": spec, "masked/cropmae": spec, "masked/i_jepa": None}


def test_recipes_that_need_several_tasks_or_do_not_train_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"one task, but merging/atlas needs several: data\.init_args\.tasks"):
        with_folder("merging/atlas", folder)
    with pytest.raises(UserError, match="is the recipe of an estimator, which does not train"):
        with_images("analysis/knn_digits", (), folder, 64, (), kinds=("estimator",))


def test_views_are_whole_patches_of_a_network_whose_name_tells_them(folder: Path) -> None:
    for size, expected in ((224, [224, 224, 98]), (112, [112, 112, 56]), (64, [70, 70, 28])):
        parts = settings(with_folder("distillation/dinov2_continued", folder, size), "data", "init_args", "views")[
            "parts"
        ]
        assert [part["init_args"]["size"] for part in parts] == expected
