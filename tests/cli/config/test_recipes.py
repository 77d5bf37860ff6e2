import os
from pathlib import Path

import pytest

from lightspan.cli.config import recipes
from lightspan.cli.config.merge import merge_layers
from lightspan.cli.config.resolve import ANY_KIND, resolve
from lightspan.cli.config.tree import plain
from lightspan.core.errors import UserError


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def merged(path: Path) -> dict:
    return plain(merge_layers(recipes.load(str(path)).layers)[0])


def test_the_catalogue_is_not_empty_and_every_recipe_says_what_it_is():
    names = recipes.catalogue_names()
    assert "language/quickstart" in names
    for name in names:
        about = recipes.load(name).about
        assert list(about) == list(recipes.ABOUT_KEYS), name
        assert about["family"] == name.split("/")[0], name


@pytest.mark.sample(60)
@pytest.mark.parametrize("name", recipes.catalogue_names())
def test_every_recipe_of_the_catalogue_passes_the_check(name):
    resolved = resolve(name, kinds=ANY_KIND)
    assert resolved.config[resolved.kind]["class_path"].startswith("lightspan.")


def test_bases_lie_below_in_the_order_given(tmp_path):
    write(tmp_path, a="x: 1\ny: 1\nz: 1\n", b="y: 2\nz: 2\n", c="base: [a.yaml, b.yaml]\nz: 3\n")
    assert merged(tmp_path / "c.yaml") == {"x": 1, "y": 2, "z": 3}


def test_bases_of_bases_and_names_of_the_catalogue(tmp_path):
    write(tmp_path, a="base: defaults\nx: 1\n", b="base: ./a.yaml\n")
    result = merged(tmp_path / "b.yaml")
    assert result["x"] == 1
    assert "checkpoint" in result["trainer"]["callbacks"]


def test_the_description_of_a_base_is_not_inherited(tmp_path):
    write(tmp_path, a="base: language/quickstart\n")
    assert recipes.load(str(tmp_path / "a.yaml")).about == {}


def test_a_circle_of_bases_is_shown(tmp_path):
    write(tmp_path, a="base: b.yaml\n", b="base: c.yaml\n", c="base: b.yaml\n")
    with pytest.raises(UserError, match=r"is circular: .*b\.yaml -> .*c\.yaml -> .*b\.yaml"):
        recipes.load(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("language/quickstrat", "unknown recipe 'language/quickstrat': did you mean language/quickstart"),
        ("quickstart", "did you mean language/quickstart or"),
        ("zzzzzzzz", "`lightspan recipes` lists the names of the catalogue; a file name ends in .yaml"),
        ("gone.yaml", "recipe file gone.yaml does not exist"),
        ("../cli", "unknown recipe '../cli'"),
    ],
)
def test_unknown_recipes_get_the_nearest_name(name, message):
    with pytest.raises(UserError) as error:
        recipes.find(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scale/dpd", "unknown overlay 'scale/dpd': did you mean scale/ddp"),
        ("zzzzzzzz", "unknown overlay 'zzzzzzzz': the catalogue has scale/bf16, scale/checkpointing, "),
        ("gone.yaml", "overlay file gone.yaml does not exist; the catalogue has scale/bf16"),
    ],
)
def test_a_missing_overlay_is_called_one(name, message):
    with pytest.raises(UserError) as error:
        recipes.load_overlay(name)
    assert message in str(error.value)


def test_a_missing_file_is_compared_with_the_files_beside_it(tmp_path, monkeypatch):
    write(tmp_path, mine="trainer: {}\n", unlike="base: mein.yaml\n")
    monkeypatch.chdir(tmp_path)
    for find in (recipes.find, recipes.load_overlay):
        with pytest.raises(UserError, match=r"mein\.yaml does not exist; did you mean mine\.yaml\?"):
            find("mein.yaml")
    with pytest.raises(UserError, match=r"mein\.yaml does not exist") as error:
        recipes.load("unlike.yaml")
    assert "did you mean" not in str(error.value)  # what lies beside another's file is not told


def test_what_is_in_the_place_of_an_overlay_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.yaml").mkdir()
    os.mkfifo("pipe.yaml")
    Path("circle.yaml").symlink_to("circle.yaml")
    for name, fault in {
        "folder": "is a folder, not a regular file",
        "pipe": "is a named pipe, not a regular file",
        "circle": "cannot be read",
    }.items():
        with pytest.raises(UserError, match=f"overlay file {name}.yaml {fault}"):
            recipes.load_overlay(f"{name}.yaml")


def test_a_link_out_of_its_folder_is_no_recipe_and_its_lines_are_not_shown(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("root:x: [secret\n")
    (tmp_path / "theirs" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "theirs")
    (tmp_path / "elsewhere").mkdir()
    for place in ("r.yaml", "sub/r.yaml", "../elsewhere/r.yaml"):
        Path(place).symlink_to(secret)
    (tmp_path / "elsewhere" / "plain.yaml").write_text("model: {}\n")
    Path("out").symlink_to(tmp_path / "elsewhere")
    Path("whole.yaml").write_text("model: {}\n")
    Path("inside.yaml").symlink_to("whole.yaml")
    Path("sub/inside.yaml").symlink_to("../whole.yaml")
    for load in (recipes.load, recipes.load_overlay):
        with pytest.raises(UserError, match=r"r\.yaml is a link that leads out of") as error:
            load("r.yaml")
        assert "secret" not in str(error.value)
        load("inside.yaml")
        load("out/plain.yaml")  # a folder that the user names
    for base in ("r.yaml", "sub/r.yaml", "out/plain.yaml", "../elsewhere/r.yaml"):
        Path("over.yaml").write_text(f"base: {base}\n")
        with pytest.raises(UserError, match="is a link that leads out of"):
            recipes.load("over.yaml")
    for base in ("inside.yaml", "sub/inside.yaml", "../elsewhere/plain.yaml"):
        Path("over.yaml").write_text(f"base: {base}\n")
        assert len(recipes.load("over.yaml").layers) == 2


def test_a_recipe_is_no_overlay(monkeypatch):
    monkeypatch.chdir(recipes.catalogue_folder())
    for name in ("contrastive/simclr", "contrastive/simclr.yaml"):
        with pytest.raises(UserError, match=f"overlay '{name}' is a recipe, .*`lightspan show contrastive/simclr`"):
            recipes.load_overlay(name)
    assert recipes.load_overlay("scale/ddp")


@pytest.mark.parametrize("name", ["a" * 5000, "a" * 5000 + ".yaml", "~nobody-of-this-name/x.yaml"])
def test_a_name_that_no_file_can_have_is_refused(name, tmp_path):
    with pytest.raises(UserError, match="cannot name a file"):
        recipes.load(name)
    (tmp_path / "r.yaml").write_text(f"base: {name}\n")
    with pytest.raises(UserError, match=r"r\.yaml:1 base: .* cannot name a file"):
        recipes.load(str(tmp_path / "r.yaml"))


def test_bases_end_somewhere_in_depth_and_in_number(tmp_path):
    for number in range(100):
        (tmp_path / f"c{number}.yaml").write_text(f"base: c{number + 1}.yaml\n")
        (tmp_path / f"d{number}.yaml").write_text(f"base: [d{number + 1}.yaml, d{number + 1}.yaml]\n")
    for name in ("c", "d"):
        (tmp_path / f"{name}100.yaml").write_text("{}\n")
        with pytest.raises(UserError, match="more than 32 files build on one another"):
            recipes.load(str(tmp_path / f"{name}0.yaml"))
        assert recipes.load(str(tmp_path / f"{name}98.yaml"))


def test_overlays_of_stand_ins_are_found_by_the_headers_that_name_the_recipe():
    found = {name: recipes.stand_ins(name) for name in recipes.catalogue_names()}
    assert found["supervised/sequence_lra_image"] == "-c scale/stand_ins_sequence -c scale/stand_ins_sequence_data"
    assert found["merging/adamerging_clip"] == "-c scale/stand_ins_clip"  # by its own header
    assert found["distillation/unip_infmix"] == "-c scale/stand_ins_unip"  # by the overlay's
    assert found["language/quickstart"] == recipes.stand_ins("mine") == ""
    named = {word for line in found.values() for word in line.split() if word != "-c"}
    assert named <= set(recipes.catalogue_names(overlays=True))


def test_the_record_of_a_run_is_called_like_the_run(tmp_path, monkeypatch):
    write(tmp_path, resolved="x: 1\n", mine="x: 1\n")
    monkeypatch.chdir(tmp_path)
    assert recipes.load("resolved.yaml").name == tmp_path.name
    assert recipes.load("mine.yaml").name == "mine"


def test_a_missing_base_is_placed(tmp_path):
    write(tmp_path, a="x: 1\nbase: nowhere.yaml\n")
    with pytest.raises(UserError, match=r"a\.yaml:2 base: recipe file .*nowhere\.yaml does not exist"):
        recipes.load(str(tmp_path / "a.yaml"))


def test_files_below_the_current_folder_are_called_by_their_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.label(tmp_path / "a.yaml") == "a.yaml"
    assert recipes.label(Path("/elsewhere/a.yaml")) == "/elsewhere/a.yaml"
