"""Finds the volumes of a folder, and which of them show one subject. Nothing is opened to find them. Without
torch."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.foreign import TooMuchError, bounded_time
from lightspan.core.files.places import PathUse
from lightspan.datamodules.image.picture_files import Kind, Links, find_labelled
from lightspan.datamodules.volume.reading import DICOM, NIFTI, VolumeFile, VoxelGrid

VOLUMES = Kind("volume", "NIfTI (.nii, .nii.gz) or DICOM (.dcm, .dicom, .ima)", (*NIFTI, *DICOM))
ALL = {"volume": "**"}
"""Every file is a subject of its own."""
_PARTS = ("subject", "session", "class")
T = TypeVar("T")


class Unreadable(Exception):
    """A file of a subject: its name, and what is wrong with it."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


def reading(file: VolumeFile, what: Callable[..., T], *arguments: Any) -> T:
    """What a function of a file gives. Raises: Unreadable for what is wrong with it; UserError as it is."""
    try:
        return what(*arguments)
    except UserError:
        raise
    except (ValueError, OSError, EOFError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise Unreadable(file.name, reason or str(error) or type(error).__name__) from error


@dataclass(frozen=True)
class Subject:
    """Registered volumes of one subject, at one session.

    Attributes:
        subject: whose volumes are all for training or all for validation.
        session: empty if the patterns name none.
        group: the class; empty if the patterns name none.
        files: of each modality in their order; None where it is missing.
        segmentation: its labels, if there are any.
    """

    subject: str
    session: str
    group: str
    files: tuple[VolumeFile | None, ...]
    segmentation: VolumeFile | None = None

    @property
    def name(self) -> str:
        return f"{self.subject}/{self.session}" if self.session else self.subject

    def grid(self, folder: Path) -> VoxelGrid:
        """The one on which all its files are, from their headers alone.

        Raises: Unreadable for a file that is damaged as far as headers tell, or not on the grid of the others.
        """
        files = [file for file in (*self.files, self.segmentation) if file is not None]
        grids = [(file.name, reading(file, file.grid, folder)) for file in files]
        (first, own), *others = grids
        for name, grid in others:
            if not own.agrees(grid):
                shapes = [" x ".join(map(str, one.shape)) for one in (grid, own)]
                where = f"{shapes[0]} voxels against {shapes[1]}" if own.shape != grid.shape else "but elsewhere"
                raise Unreadable(name, f"it is not on the grid of {first}, {where}; register them")
        return own


@dataclass(frozen=True)
class FoundSubjects:
    """The subjects of a folder by name, the names of their classes, none without any, and what was left out."""

    folder: Annotated[Path, PathUse.READ]
    subjects: list[Subject]
    classes: list[str]
    remarks: list[str]


def find_subjects(
    folder: Path, modalities: Mapping[str, str] = ALL, segmentation: str | None = None, links: Links = "skip"
) -> FoundSubjects:
    """The NIfTI files and DICOM series below a folder, a series being the slices in one folder, sorted into subjects.

    Args:
        modalities: name -> pattern of the files' names below `folder`, without their endings: `*` stands for any
            letters but "/", `**` for any, `**/` for any folders or none, and `{subject}`, `{session}` and `{class}` for
            a part of the name, of at least one letter and without "/". Without `{subject}` each file is a subject.
        segmentation: pattern of labels. A file that fits it is no volume.
        links: as in `lightspan.datamodules.image.picture_files.find_labelled`.
    Raises: UserError for no volume, a pattern that nothing fits, that is none or that takes too long to match, and two
        files of one subject for one modality.
    """
    if not modalities:
        raise UserError("modalities is empty; give the name and the pattern of at least one")
    wanted = {name: _regex(f"modalities.{name}", pattern) for name, pattern in modalities.items()}
    together = len(modalities) > 1 or segmentation is not None
    if lacking := [name for name, regex in wanted.items() if together and "subject" not in regex.groupindex]:
        raise UserError(
            f"modalities.{lacking[0]}={modalities[lacking[0]]!r} does not tell which files show one subject; put "
            "{subject} where the file's name has it"
        )
    labels = None if segmentation is None else _regex("segmentation", segmentation)
    if labels is not None and "subject" not in labels.groupindex:
        raise UserError(f"segmentation={segmentation!r} does not tell whose labels a file has; put {{subject}} there")
    found = find_labelled(folder, VOLUMES, links, "none")
    files = volume_files(found.names)
    held: dict[tuple[str, str], dict[str, VolumeFile]] = defaultdict(dict)
    groups: dict[tuple[str, str], str] = {}
    used = dict.fromkeys([*wanted, *(["segmentation"] if labels is not None else [])], 0)
    others = 0
    bares = [_without_ending(file, folder) for file in files]
    labelled = _matches("segmentation", labels, bares)
    matches = {name: _matches(f"modalities.{name}", regex, bares) for name, regex in wanted.items()}
    for at, (file, bare) in enumerate(zip(files, bares, strict=True)):
        of_each = {name: match for name, found_at in matches.items() if (match := found_at[at]) is not None}
        fits = of_each if (label := labelled[at]) is None else {"segmentation": label}
        others += not fits
        for name, match in fits.items():
            parts = match.groupdict()
            key = parts.get("subject") or bare, parts.get("session") or ""
            used[name] += 1
            if (twin := held[key].setdefault(name, file)) is not file:
                raise UserError(
                    f"{one_line(twin.name)} and {one_line(file.name)} in {folder} are both {name} of "
                    f"{one_line('/'.join(filter(None, key)))}; name more of the path in its pattern, or {{session}}"
                )
            if (group := parts.get("class")) is not None and groups.setdefault(key, group) != group:
                raise UserError(
                    f"{one_line(key[0])} in {folder} is of class {one_line(groups[key])} and of {one_line(group)}"
                )
    if unused := [name for name, count in used.items() if not count]:
        pattern = segmentation if unused[0] not in wanted else modalities[unused[0]]
        raise UserError(
            f"no volume of {folder} fits {pattern!r}, the pattern of {unused[0]}; it has {len(files):,} volumes, such "
            f"as {one_line(_without_ending(files[0], folder))}"
        )
    subjects = [
        Subject(*key, groups.get(key, ""), tuple(parts.get(name) for name in wanted), parts.get("segmentation"))
        for key, parts in sorted(held.items())
        if parts.keys() & wanted.keys()
    ]
    remarks = list(found.remarks)
    if others:
        remarks.append(f"{others:,} volumes fit no pattern and were left out")
    if alone := len(held) - len(subjects):
        remarks.append(f"{alone:,} segmentations without a volume were left out")
    if groups and (unknown := [one.name for one in subjects if not one.group]):
        raise UserError(f"{one_line(unknown[0])} in {folder} has no class; put {{class}} into the pattern of each")
    return FoundSubjects(folder, subjects, sorted(set(groups.values())), remarks)


def volume_files(names: Iterable[str]) -> list[VolumeFile]:
    """By name: each NIfTI file, and the DICOM files of one folder as a series."""
    series: dict[str, list[str]] = defaultdict(list)
    files = []
    for name in names:
        if name.lower().endswith(NIFTI):
            files.append(VolumeFile(name))
        else:
            path = PurePosixPath(name)
            series[str(path.parent)].append(path.name)
    files += [VolumeFile(name, tuple(sorted(slices))) for name, slices in series.items()]
    return sorted(files, key=lambda file: file.name)


def _without_ending(file: VolumeFile, folder: Path) -> str:
    """What patterns are held against; of a series in the folder itself that folder's name."""
    if file.slices:
        return folder.name if file.name == "." else file.name
    return _bare(file.name)


def _bare(name: str) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)


def _regex(setting: str, pattern: str) -> re.Pattern[str]:
    written, seen = "", set[str]()
    # Each wildcard tries every length with every length of the others: neighbours are one.
    joined = re.sub(r"(\*\*/)+", "**/", re.sub(r"\*{3,}", "**", _bare(pattern)))
    for part in re.split(r"(\*\*/|\*\*|\*|\{[^{}]*\})", joined):
        if part.startswith("{") and (name := part[1:-1]) not in _PARTS:
            raise UserError(f"{setting}={pattern!r}: {part} is none of {', '.join(f'{{{one}}}' for one in _PARTS)}")
        if part.startswith("{"):
            written += f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+)"
            seen.add(name)
        else:
            written += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}.get(part, re.escape(part))
    return re.compile(written, re.DOTALL)


def _matches(setting: str, regex: re.Pattern[str] | None, names: list[str]) -> list[re.Match[str] | None]:
    """Of each name; None without a pattern."""
    try:
        with bounded_time():
            return [None if regex is None else regex.fullmatch(name) for name in names]
    except TooMuchError as error:
        raise UserError(f"{setting} has too many wildcards, `*` or {{...}}, to match names with: {error}") from error
