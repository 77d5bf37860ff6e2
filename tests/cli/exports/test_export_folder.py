"""The folder of an export on a disk that is full: one clear error, and nothing that looks like an export."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lightspan.cli.commands.evaluate import _write_predictions
from lightspan.cli.exports.folder import whole_folder
from lightspan.cli.exports.program import write_program
from lightspan.cli.exports.standalone import Standalone, reading_of
from lightspan.core.errors import UserError

FULL = Path("/dev/full")
"""Every write into it meets a full disk."""
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


class Means(nn.Module):
    def features(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["image"].flatten(1)


def test_a_full_disk_that_safetensors_meets_is_a_user_error(tmp_path: Path) -> None:
    def export(said: str) -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            raise SafetensorError(said)

    with pytest.raises(UserError, match=r"cannot write .*/out: the disk is full .* with --out"):
        export("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="another"):
        export("another fault")
    assert list(tmp_path.iterdir()) == []


@needs_full
def test_a_full_disk_that_a_program_meets_ends_no_process() -> None:
    reading = reading_of(Means(), {"image": torch.zeros(1, 1, 2, 2)}, None)
    with pytest.raises(OSError, match="No space left") as error:
        write_program(Standalone(Means(), reading), FULL, {})
    assert error.value.errno == errno.ENOSPC


@needs_full
def test_a_full_disk_that_predictions_meet_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightspan.core.files.atomic.temporary_path", lambda path, mark: path.with_name("temporary"))
    (tmp_path / "temporary").symlink_to(FULL)
    with pytest.raises(UserError, match=r"cannot write .*/predictions.pt: the disk is full"):
        _write_predictions([torch.zeros(3)], tmp_path / "predictions.pt")
    assert list(tmp_path.iterdir()) == []
