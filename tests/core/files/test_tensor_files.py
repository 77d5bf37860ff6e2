"""Safetensors written in pieces are those that the format's own library writes and reads."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lightspan.core.errors import UserError
from lightspan.core.files.foreign import SETTINGS_BYTES
from lightspan.core.files.tensors import DTYPES, Form, header, stored_tensors, write_tensors

TENSORS = {f"x{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(DTYPES)}
TENSORS |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "strided": torch.arange(6.0).reshape(2, 3).T}


def test_every_dtype_comes_back_as_it_was(tmp_path: Path) -> None:
    forms = {name: Form(tuple(x.shape), x.dtype) for name, x in TENSORS.items()}
    write_tensors(tmp_path / "t.safetensors", forms, TENSORS.items(), {"format": "pt", "ü": '{"a": 1}'})
    back = load_file(tmp_path / "t.safetensors")
    assert back.keys() == TENSORS.keys()
    for name, x in TENSORS.items():
        assert back[name].dtype == x.dtype
        assert back[name].shape == x.shape
        assert (
            back[name].contiguous().view(-1).view(torch.uint8).tolist()
            == x.contiguous().view(-1).view(torch.uint8).tolist()
        )
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "ü": '{"a": 1}'}


def test_a_tensor_may_come_in_pieces_of_its_rows(tmp_path: Path) -> None:
    x = torch.randn(10, 3)
    pieces = [("a", x[:4]), ("a", x[4:]), ("none", x[:0]), ("b", x)]
    forms = {"a": Form((10, 3), x.dtype), "none": Form((0, 3), x.dtype), "b": Form((10, 3), x.dtype)}
    write_tensors(tmp_path / "t.safetensors", forms, iter(pieces), {})
    back = load_file(tmp_path / "t.safetensors")
    assert torch.equal(back["a"], x)
    assert torch.equal(back["b"], x)


@pytest.mark.parametrize("pieces", [[("b", 2), ("a", 2)], [("a", 1), ("b", 2)], [("a", 2)]], ids=str)
def test_pieces_that_are_not_what_was_said_end_the_write(pieces: list[tuple[str, int]], tmp_path: Path) -> None:
    forms = {"a": Form((2,), torch.float32), "b": Form((2,), torch.float32)}
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "t", forms, ((name, torch.ones(size)) for name, size in pieces), {})


def test_a_kind_of_tensor_without_a_name_in_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tensor z is torch\.complex128, which safetensors files cannot contain"):
        write_tensors(tmp_path / "t", {"z": Form((1,), torch.complex128)}, [], {})


def test_a_header_above_the_limit_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its tensors takes more memory than its description, though none has a number."""
    path, content = tmp_path / "t.safetensors", header({str(i): Form((0,), torch.int8) for i in range(99)}, {})
    path.write_bytes(content)
    monkeypatch.setenv(SETTINGS_BYTES.setting, str(len(content) - 8))
    assert len(stored_tensors(path)[0]) == 99
    monkeypatch.setenv(SETTINGS_BYTES.setting, str(len(content) - 9))
    with pytest.raises(UserError, match=rf"t\.safetensors.*{SETTINGS_BYTES.setting}"):
        stored_tensors(path)
    for damaged in (b"", content[:4], content[:-1], b"\xff" * 2000):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a complete safetensors file"):
            stored_tensors(path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="only Linux has such a file")
def test_a_regular_file_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(UserError, match="/proc/self/mem"):
        stored_tensors("/proc/self/mem")
