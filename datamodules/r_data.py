"""Data sets of R packages, read without R from where Debian and Ubuntu install them.

An R package has its data sets in two files. `Rdata.rdx` is a list in R's own serialisation whose `variables` give
offset and length of each data set in `Rdata.rdb`. Such a piece is 4 bytes of unpacked size, big-endian, and then a zlib
stream, or a letter and data packed as it says: `2` bzip2, `Z` raw LZMA2, `0` uncompressed. Source: R's
src/main/serialize.c, R_compress1 to R_compress3.
"""

import bz2
import lzma
import zlib
from pathlib import Path
from typing import Any

from lightspan.core.errors import UserError
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import BYTES, content_of, drained, unpacked

LIBRARIES = (
    Path("/usr/lib/R/site-library"),
    Path("/usr/local/lib/R/site-library"),
    Path("/usr/lib/R/library"),
    Path("/usr/lib64/R/library"),
)


def read_r_data(package: str, names: tuple[str, ...], library: str | None = None) -> list[Any]:
    """The named data sets: a vector of texts as a list of str, a data frame as a pandas DataFrame.

    Args:
        package: the R package, e.g. modeldata; as a Debian package r-cran-modeldata.
        names: of its data sets.
        library: folder that contains the package's folder; None searches the usual places of R packages.
    Raises: UserError naming what to install, or the file that is damaged.
    """
    try:
        from rdata.conversion import DEFAULT_CLASS_MAP, convert
        from rdata.parser import parse_data
    except ImportError as error:
        raise UserError("reading data of R packages needs rdata, which is not installed: pip install rdata") from error
    folder = find_package(package, library)
    classes = {**DEFAULT_CLASS_MAP, "tbl_df": DEFAULT_CLASS_MAP["data.frame"]}  # a tibble is a data frame
    try:
        index = convert(parse_data(unpacked(content_of(folder / "Rdata.rdx")), extension=".rds"))["variables"]
        content = content_of(folder / "Rdata.rdb")
        places = [(int(index[name][0]), int(index[name][1])) for name in names]
        pieces = [unpack(content[at : at + size]) for at, size in places]
        return [plain(convert(parse_data(piece, extension=".rds"), classes)) for piece in pieces]
    except (LookupError, ValueError, EOFError, TypeError, NotImplementedError, RecursionError) as error:
        raise UserError(
            f"{folder} does not contain {' and '.join(names)} of the R package {package} in a form that can be read "
            f"({type(error).__name__}: {error}); reinstall r-cran-{package.lower()}"
        ) from error


def find_package(package: str, library: str | None) -> Path:
    """Folder with the data of an installed R package. Raises: UserError if there is none."""
    libraries = LIBRARIES if library is None else (expanded(library, "data.init_args.library"),)
    for place in libraries:
        folder = place / package / "data"
        if (folder / "Rdata.rdx").is_file():
            return folder
    raise UserError(
        f"the R package {package} is not in {' or '.join(map(str, libraries))}; install it with `apt-get install "
        f"r-cran-{package.lower()}`, or unpack it with `apt-get download r-cran-{package.lower()}` and `dpkg -x "
        "r-cran-*.deb FOLDER` and set data.init_args.library=FOLDER/usr/lib/R/site-library"
    )


def unpack(piece: bytes) -> bytes:
    """One piece of an `rdb` file. Raises: ValueError if its size is not the one it states."""
    size, kind, rest = int.from_bytes(piece[:4], "big"), piece[4:5], piece[5:]
    BYTES.require(size)
    if kind == b"2":
        data = drained(bz2.BZ2Decompressor(), rest, size)
    elif kind == b"Z":
        raw = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
        data = drained(raw, rest, size)
    elif kind == b"0":
        data = rest
    else:
        data = drained(zlib.decompressobj(), piece[4:], size)
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes instead of the announced {size}")
    return data


def plain(value: Any) -> Any:
    """R's vectors as lists of Python's own types; data frames unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value
