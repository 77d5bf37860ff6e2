"""DICOM files by SimpleITK, whose decoders are C++: in a process of its own. Without torch."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightspan.core.decoding import Answer, DecoderProcess, serve
from lightspan.core.errors import UserError, install_extra

_TAGS = {"series": "0020|000e", "bits": "0028|0100"}
_DECODER = DecoderProcess(__name__)


def header(path: Path) -> dict[str, Any]:
    """`size`, `spacing`, `origin` and `direction` as SimpleITK has them, `components` of a voxel, `bits` and `series`.

    Raises: ValueError for what is no DICOM image, or damaged; UserError without SimpleITK.
    """
    answer, _ = _DECODER.ask(path=str(path.absolute()), voxels=False)
    return {**answer}


def voxels(path: Path) -> np.ndarray:
    """[..., y, x] in the file's unit. Raises: ValueError for what cannot be decoded."""
    _, arrays = _DECODER.ask(path=str(path.absolute()), voxels=True)
    return arrays["voxels"]


def without(package: str) -> UserError:
    """What to raise where a package is missing that reads volumes."""
    return UserError(f"volumes are read by {package}, which is not installed: {install_extra('volumes')}")


def _opened() -> partial[Answer]:
    try:
        import SimpleITK
    except ImportError as error:
        raise without("SimpleITK") from error
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what is wrong is said once, by us
    return partial(_read, SimpleITK)


def _read(sitk: Any, path: str, voxels: bool) -> Answer:
    if voxels:
        return {}, {"voxels": sitk.GetArrayFromImage(sitk.ReadImage(path, imageIO="GDCMImageIO"))}
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    reader.ReadImageInformation()
    told = {name: reader.GetMetaData(tag) for name, tag in _TAGS.items() if reader.HasMetaDataKey(tag)}
    geometry = {name: getattr(reader, f"Get{name.title()}")() for name in ("size", "spacing", "origin", "direction")}
    return {**told, **geometry, "components": reader.GetNumberOfComponents()}, {}


if __name__ == "__main__":
    serve(_opened)
