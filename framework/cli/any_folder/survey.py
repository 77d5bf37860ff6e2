"""What a folder holds: files of which kinds, how many, how large, of which classes. Few of them are opened."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightspan.cli.any_folder.kinds import DESCRIBING, EVERY_ENDING, KINDS, SHARED, DataKind
from lightspan.cli.config.user_folders import split_folders
from lightspan.core.errors import UserError, one_line
from lightspan.datamodules.graph.reading import is_graph
from lightspan.datamodules.image.picture_files import FilesBelow, files_below, sorted_into_classes
from lightspan.datamodules.shards.headers import looked_at
from lightspan.datamodules.volume.subjects import volume_files

MOST_ENTRIES = 1_000_000
"""Files and folders that are counted."""
MOST_TOLD_APART, MOST_OPENED, MOST_BYTES = 1_000, 8, 2**26
"""Files whose first lines tell their kind; those of a kind that its reader looks at, spread evenly; and the bytes of a
file that it looks at, since some readers read all of it, unless all are larger.
"""
MAIN_SHARE = 0.9
"""Of all files: those of one kind that are so many are meant."""
MOST_SHOWN = 5


@dataclass(frozen=True)
class FoundKind:
    """Samples of one kind in a folder.

    Attributes:
        names: of the files, relative to the folder and sorted; of a DICOM series one of its slices.
        opened: how many were looked at.
        sizes: unit -> the least and the most of those that could be read.
        faults: a line on each of the others.
        lacks: what this machine lacks to read them; empty if nothing.
    """

    kind: DataKind
    names: list[str]
    opened: int
    sizes: dict[str, tuple[float, float]]
    faults: list[str]
    lacks: str = ""

    @property
    def is_readable(self) -> bool:
        """Whether any that was looked at could be read, as far as this machine can tell."""
        return bool(self.lacks) or len(self.faults) < self.opened

    def said(self) -> str:
        """How many there are and how large, in words."""
        name = self.kind.one if len(self.names) == 1 else self.kind.name
        parts = [f"{len(self.names):,} {name}"]
        parts += [_range(low, high, unit) for unit, (low, high) in self.sizes.items()]
        looked = f" ({self.opened:,} were opened)" if self.sizes and self.opened < len(self.names) else ""
        return ", ".join(parts) + looked


@dataclass(frozen=True)
class Classes:
    """Of the files to train on: how many each class has, none without classes; whether a folder validates; and whether
    any of them is in a sub-folder.
    """

    counts: dict[str, int]
    validates: bool = False
    nested: bool = False

    def said(self) -> str:
        if not self.counts:
            return "no labels: " + ("the sub-folders are not classes" if self.nested else "there are no sub-folders")
        shown = ", ".join(f"{one_line(name)} {count:,}" for name, count in [*self.counts.items()][:MOST_SHOWN])
        more = f" and {len(self.counts) - MOST_SHOWN:,} more" if len(self.counts) > MOST_SHOWN else ""
        return f"{len(self.counts):,} classes by sub-folder: {shown}{more}"


@dataclass(frozen=True)
class Survey:
    """What a folder holds: kinds with the most samples first, and what belongs to none."""

    folder: Path
    kinds: list[FoundKind]
    below: FilesBelow
    set_aside: list[str] = field(default_factory=list)

    def classes(self, found: FoundKind) -> Classes:
        """As the data module of the kind takes them by itself. Raises: UserError, see `split_folders`."""
        home = self.folder.absolute()
        training, validation = split_folders(home)
        before = "" if training == home else f"{training.name}/"
        names = [name.removeprefix(before) for name in found.names if name.startswith(before)]
        if not names:
            raise UserError(f"{training} has no {found.kind.one} to train on; put some of them there")
        if not found.kind.has_classes:
            return Classes({}, validation is not None)
        files = sorted_into_classes(training, names, found.kind.kind)
        numbers = Counter(files.labels.tolist())
        counts = {name: numbers[at] for at, name in enumerate(files.classes)}
        return Classes(counts, validation is not None, any("/" in name for name in names))

    def main(self) -> FoundKind:
        """The kind to train on: the only one beside texts and tables, of which there are no more than of it; or that of
        nearly all files.

        Raises: UserError that names what to do, for none, for several, and for one that cannot be read.
        """
        sound = [one for one in self.kinds if one.is_readable]
        if not sound and self.kinds:
            first = self.kinds[0]
            raise UserError(
                f"{self.folder} holds {first.said()}, but none of the {first.opened:,} that were opened can be read: "
                f"{few(first.faults)}; repair them, or name another folder"
            )
        if not sound:
            raise UserError(f"{self.folder} {self._nothing()}")
        data = [one for one in sound if one.kind.modality not in DESCRIBING]
        beside = sum(len(one.names) for one in sound if one.kind.modality in DESCRIBING)
        if len(data) == 1 and beside <= len(data[0].names):
            return data[0]
        if len(sound[0].names) >= MAIN_SHARE * sum(len(one.names) for one in sound):
            return sound[0]
        ways = ", ".join(f"{len(one.names):,} {one.kind.name} ({one.kind.option or 'data.init_args.paths'})"
                         for one in sound)  # fmt: skip
        raise UserError(
            f"{self.folder} holds several kinds of data: {ways}; name a sub-folder of one kind with --data, or a "
            "recipe and the option of the kind that is meant"
        )

    def _nothing(self) -> str:
        readable = "; ".join(one.kind.formats for one in KINDS)
        if self.below.links and not self.below.others:
            return (
                f"holds nothing but links ({self.below.links:,}), and none is followed unasked; name the place that "
                "they lead to, or a recipe and data.init_args.links=follow"
            )
        if not self.below.others:
            return f"is empty; name a folder of files of one kind: {readable}"
        return (
            f"holds {self.below.others.total():,} files, none of which is read here: {self.below.shown_others()}; "
            f"these are: {readable}"
        )

    def lines(self, main: FoundKind) -> list[str]:
        """What was left out, in words."""
        lines = [f"{one.said()}: left out" for one in self.kinds if one is not main and one.is_readable]
        lines += [f"{one.said()}: none that was opened can be read: {few(one.faults)}"
                  for one in self.kinds if not one.is_readable]  # fmt: skip
        if main.faults:
            counted = f"{len(main.faults):,} of {main.opened:,} that were opened"
            lines.append(f"{counted} cannot be read: {few(main.faults)}")
            if main.kind.modality not in DESCRIBING:
                lines.append("data.init_args.skip_damaged=true trains without such files")
        others, links = self.below.others.total(), self.below.links
        if others:
            lines.append(f"{_range(others, others, 'files')} of other kinds: left out ({self.below.shown_others()})")
        if links:
            lines.append(f"{_range(links, links, 'links')}: not followed (data.init_args.links=follow does)")
        if not self.below.whole:
            lines.append(f"counted to {MOST_ENTRIES:,} files and folders; there are more, and the run reads all")
        return lines


def survey(folder: Path) -> Survey:
    """Raises: UserError for what is no folder, and for one that cannot be listed."""
    below = files_below(folder, EVERY_ENDING, most=MOST_ENTRIES)
    named: dict[str, list[str]] = {one.name: [] for one in KINDS}
    shared = [name for name in below.names if name.lower().endswith(SHARED)]
    graphs = _graphs_among(folder, sorted(shared))
    others = Counter[str]()
    for name in below.names:
        lower = name.lower()
        fits = [one for one in KINDS if lower.endswith(one.kind.endings)]
        if lower.endswith(SHARED):
            fits = [one for one in fits if (one.modality == "graph") == (name in graphs)]
        if fits:
            named[fits[0].name].append(name)
        else:
            others[Path(name).suffix.lower()] += 1
    kinds = [_looked(folder, one, named[one.name]) for one in KINDS if named[one.name]]
    kinds.sort(key=lambda found: -len(found.names))
    return Survey(folder, kinds, below._replace(others=below.others + others))


def _graphs_among(folder: Path, names: list[str]) -> set[str]:
    """Those that are graphs; of very many, all or none, as most of those that were opened are."""
    opened = [names[at] for at in looked_at(len(names), MOST_TOLD_APART)] if names else []
    graphs = {name for name in opened if is_graph(folder / name)}
    if len(opened) == len(names):
        return graphs
    return {*names} if 2 * len(graphs) > len(opened) else set()


def _looked(folder: Path, kind: DataKind, names: list[str]) -> FoundKind:
    if kind.modality == "volume":
        names = [f"{file.name}/{file.slices[0]}" if file.slices else file.name for file in volume_files(names)]
    names = sorted(names)
    look, sizes, faults = kind.look(folder, {}), dict[str, tuple[float, float]](), list[str]()
    opened = _to_open(folder, names)
    for name in opened:
        try:
            seen = look(name)
        except UserError as error:  # of this machine, not of the file
            return FoundKind(kind, names, 0, {}, [], str(error))
        except (ValueError, OSError) as error:
            faults.append(f"{one_line(name)} ({one_line(error)})")
            continue
        for unit, count in seen.sizes.items():
            low, high = sizes.get(unit, (count, count))
            sizes[unit] = min(low, count), max(high, count)
    return FoundKind(kind, names, len(opened), sizes, faults)


def _to_open(folder: Path, names: list[str]) -> Sequence[str]:
    some = [names[at] for at in looked_at(len(names), MOST_OPENED)]
    size = {name: (folder / name).stat().st_size for name in some if (folder / name).exists()}
    small = [name for name in some if size.get(name, 0) <= MOST_BYTES]
    return small or [min(some, key=lambda name: size[name])]


def few(faults: Sequence[str]) -> str:
    """The first `MOST_SHOWN` of some lines, and how many more there are."""
    more = f", and {len(faults) - MOST_SHOWN:,} more" if len(faults) > MOST_SHOWN else ""
    return ", ".join(faults[:MOST_SHOWN]) + more


def _range(low: float, high: float, unit: str) -> str:
    """Of a unit in the plural."""
    first, _, rest = unit.partition(" ")
    unit = f"{first.removesuffix('s') if high == 1 else first} {rest}".rstrip()
    return f"{_number(low)}{'' if low == high else f' to {_number(high)}'} {unit}"


def _number(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 or float(number).is_integer() else f"{number:.3g}"
