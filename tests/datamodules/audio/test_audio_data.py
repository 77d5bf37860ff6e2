"""Folders of recordings and spoken captions: what becomes of files, labels, splits, and of what is wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sound_files import BAD, encoded, tone, write_recordings

from lightspan.core.errors import UserError
from lightspan.datamodules.audio.folder import AudioFolder
from lightspan.datamodules.audio.spoken import FOLDER, KEYWORDS, SpokenCaptions, english, keyword
from lightspan.datamodules.loading.workers import Damaged


def folder(path: Path, **settings: object) -> AudioFolder:
    return AudioFolder(str(path), **{"seconds": 0.3, "batch_size": 2, "val_share": 0.25} | settings)  # type: ignore[arg-type]


def test_a_run_resumes_with_the_same_files_of_the_same_size_alone(tmp_path: Path) -> None:
    write_recordings(tmp_path, {"a": 4, "b": 4})

    def content() -> str:
        data = folder(tmp_path)
        data.setup()
        return data.training_order().content

    first, kept = content(), {file: file.read_bytes() for file in tmp_path.rglob("*.wav")}
    assert content() == first
    for file in kept:
        file.write_bytes(encoded(tone(0.4)))
    assert content() != first
    for file, sound in kept.items():
        file.write_bytes(sound)
    assert content() == first


def test_sub_folders_are_classes_and_a_share_of_each_validates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recordings(tmp_path, {"no": 4, "yes": 8})
    (tmp_path / "notes.txt").write_text("x")
    data = folder(tmp_path)
    data.setup()
    assert (data.classes, len(data.train), len(data.val)) == (("no", "yes"), 9, 3)
    assert torch.bincount(torch.cat([batch["label"] for batch in data.bank_dataloader()])).tolist() == [3, 6]
    assert sorted(torch.cat([batch["label"] for batch in data.val_dataloader()]).tolist()) == [0, 1, 1]
    printed = capsys.readouterr().out
    assert "1 other files were left out: 1 .txt" in printed
    assert "recordings: 9 for training and 3 for validation, at 16,000 Hz, of at most 0.3 s, 2 classes" in printed
    again = folder(tmp_path, seed=7)
    again.setup()
    assert again.train.files == data.train.files  # the split depends on names alone


def test_files_in_no_sub_folder_have_no_labels_and_every_format_is_read(tmp_path: Path) -> None:
    for ending in ("wav", "flac", "ogg", "mp3"):
        (tmp_path / f"one.{ending.upper()}").write_bytes(encoded(tone(0.2), ending=ending))
    data = folder(tmp_path, batch_size=3)
    data.setup()
    (batch,) = data.train_dataloader()
    assert batch["wave"].shape == (3, 4800)
    assert batch["length"].tolist() == [3200] * 3
    assert batch["label"].tolist() == [0] * 3
    assert data.classes == ()


def test_recordings_of_speakers_who_do_not_train_validate(tmp_path: Path) -> None:
    write_recordings(tmp_path / "train", {"a": 2, "b": 2})
    write_recordings(tmp_path / "val", {"b": 3})
    data = folder(tmp_path / "train", val_folder=str(tmp_path / "val"))
    data.setup()
    assert len(data.train) == 4
    assert [int(data.val.sample(i, 0)["label"]) for i in range(3)] == [1, 1, 1]
    write_recordings(tmp_path / "val", {"c": 1})
    with pytest.raises(UserError, match="has c, which is no class of"):
        folder(tmp_path / "train", val_folder=str(tmp_path / "val")).setup()


def test_training_draws_a_segment_by_its_seed_and_evaluation_takes_the_middle(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        ramp = np.linspace(0, 0.5, 16_000, dtype=np.float32)
        (tmp_path / f"{name}.wav").write_bytes(encoded(ramp, subtype="FLOAT"))
    data = folder(tmp_path)
    data.setup()
    first = [float(data.train.sample(0, seed)["wave"][0]) for seed in (1, 2, 1)]
    assert first[0] == first[2] != first[1]
    assert (
        float(data.bank.sample(0, 1)["wave"][0])
        == float(data.val.sample(0, 2)["wave"][0])
        == pytest.approx(0.175, abs=1e-3)
    )
    epochs = [next(iter(loader)) for loader in [data.train_dataloader()] * 2]
    assert not torch.equal(epochs[0]["wave"], epochs[1]["wave"])


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_before_the_first_step_or_left_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recordings(tmp_path, {"": 4})
    (tmp_path / "bad.wav").write_bytes(BAD[name][0])
    with pytest.raises(UserError, match=rf"1 of 5 recordings cannot be read:\n  .*bad\.wav: ({BAD[name][1]})") as error:
        folder(tmp_path).setup()
    assert "Repair or remove them, or train without them with data.init_args.skip_damaged=true" in str(error.value)
    data = folder(tmp_path, skip_damaged=True)
    data.setup()
    assert "1 of 5 recordings cannot be read and are left out" in capsys.readouterr().out
    assert len(data.train) + len(data.val) == 4


def test_damage_that_shows_later_is_named_or_replaced(tmp_path: Path) -> None:
    write_recordings(tmp_path, {"": 4})
    for skip in (False, True):
        data = folder(tmp_path, skip_damaged=skip)
        data.setup()
        sound = data.train.files[0].read_bytes()
        data.train.files[0].write_bytes(b"")
        with pytest.raises(Damaged if skip else UserError, match=r"\.wav: it is empty"):
            data.train.sample(0, 0)
        if skip:
            assert sum(len(batch["wave"]) for batch in data.train_dataloader()) == 2
        data.train.files[0].write_bytes(sound)


def test_silence_clipping_and_lower_rates_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recordings(tmp_path, {"": 3})
    (tmp_path / "loud.wav").write_bytes(encoded((9 * tone()).clip(-1, 1)))
    (tmp_path / "quiet.wav").write_bytes(encoded(np.zeros(900, np.float32)))
    (tmp_path / "phone.wav").write_bytes(encoded(tone(rate=8_000), 8_000))
    data = folder(tmp_path, level_db=-25.0)
    data.setup()
    printed = capsys.readouterr().out
    assert "1 of 6 recordings that were listened to are clipped" in printed
    assert "1 of 6 recordings that were listened to are silent" in printed
    assert "1 recordings have a sample rate below 16,000 Hz" in printed
    for batch in (*data.bank_dataloader(), *data.val_dataloader()):
        assert batch["wave"].isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"val_share": 1.0}, "val_share=1.0 must be above 0"),
        ({"labels": "folders"}, "labels=folders wants each recording"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], said: str, tmp_path: Path) -> None:
    write_recordings(tmp_path, {"": 2})
    with pytest.raises(UserError, match=said):
        folder(tmp_path, **settings).setup()


def test_folders_without_recordings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file that ends in \.wav, \.flac, \.ogg, \.mp3; the folder is empty"):
        folder(tmp_path).setup()
    with pytest.raises(
        UserError, match=r"recording folder .*none does not exist; name a folder of WAV, FLAC, OGG or MP3"
    ):
        folder(tmp_path / "none").setup()
    write_recordings(tmp_path, {"": 1})
    with pytest.raises(UserError, match="no readable recordings are left for val: 1 for train"):
        folder(tmp_path).setup()
    (tmp_path / "0.wav").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 recordings can be read"):
        folder(tmp_path, skip_damaged=True).setup()


# Spoken captions


def stamps(path: Path) -> Path:
    """Twelve stamps of ten captions, in two languages each, and a sound effect."""
    path.mkdir()
    for number in range(12):
        caption = f"The letter {number}." if number < 10 else "A red hat."
        (path / f"s{number}.txt").write_text(f"{caption}\nfr.utf8=Bonjour.\n")
        (path / f"s{number}.ogg").write_bytes(encoded(tone(0.1), ending="ogg"))
        for language in ("fr", "el"):
            (path / f"s{number}_desc_{language}.ogg").write_bytes(encoded(tone(0.1), ending="ogg"))
    return path


def test_no_caption_is_on_two_sides_and_no_sound_effect_among_them(tmp_path: Path) -> None:
    root = stamps(tmp_path / "in")
    (root / "s0_desc_other_fr.ogg").write_bytes(encoded(tone(0.1), ending="ogg"))  # of another language
    data = SpokenCaptions(str(root), ("el", "fr"), 0.3, 0.3, seconds=0.2, batch_size=2)
    data.setup()
    sides = [{english(file) for file in samples.files} for samples in (data.train, data.val, data.test)]
    assert sum(map(len, sides)) == len(set().union(*sides)) == 11
    assert sum(len(samples) for samples in (data.train, data.val, data.test)) == 24
    assert all("_desc_" in file.name for file in data.train.files)
    for samples in (data.train, data.val, data.test):
        for place, file in enumerate(samples.files):
            sample = samples.sample(place, 0)
            assert data.languages[int(sample["label"])] in file.name
            assert int(sample["keyword"]) == KEYWORDS.index("hat" if "hat" in english(file) else "letter")


def test_keywords_are_whole_words_or_their_plurals() -> None:
    assert KEYWORDS[keyword("A pair of red shoes.")] == "pair"
    assert KEYWORDS[keyword("Two TRUCKS!")] == "truck"
    for caption in ("", "That is a hatter.", "A reddish thing"):
        assert keyword(caption) == len(KEYWORDS)


def test_what_lacks_is_said_with_its_package(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no spoken captions of language be .*install the system package tuxpaint-stamps-default"
    ):
        SpokenCaptions(str(tmp_path)).setup()
    with pytest.raises(UserError, match=r"val_share=0\.6 and test_share=0\.5 must be above 0"):
        SpokenCaptions(val_share=0.6, test_share=0.5)
    with pytest.raises(UserError, match=r"languages=\['fr', 'fr'\] must name at least one, and each once"):
        SpokenCaptions(languages=("fr", "fr"))


def test_the_package_has_the_stated_recordings() -> None:
    if not FOLDER.is_dir():
        pytest.skip("the package tuxpaint-stamps-default is not installed")
    data = SpokenCaptions(languages=("da",), batch_size=2)
    files, labels, parts = data.find()
    assert len(files) > 300
    assert sum(map(len, parts.values())) == len(files)
    assert (labels["keyword"] < len(KEYWORDS)).sum() > 30
