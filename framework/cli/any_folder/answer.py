"""`lightspan fit --data FOLDER`: what is in it, which recipe takes it and why, and the command that does the same."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightspan.cli.any_folder.choices import FEW_LABELS, Choice, choice
from lightspan.cli.any_folder.kinds import KINDS
from lightspan.cli.any_folder.survey import Classes, FoundKind, survey
from lightspan.core.errors import UserError, one_line
from lightspan.core.files.foreign import opened_regular
from lightspan.datamodules.table.columns import Cells, categories_of, read_columns
from lightspan.datamodules.text.endings import LINES

CLASSES = 10
"""Values of a column of whole numbers that are taken for classes, at most."""
MOST_COLUMNS = 20
SEGMENT_S = 15
"""Of recordings: the longest segment, unless a setting names another."""


@dataclass(frozen=True)
class Answer:
    """What is said, and the words of the command behind `lightspan fit`: a recipe, its data, and settings.

    Attributes:
        needs: what the command needs besides, so that it cannot run yet; empty if nothing.
    """

    lines: list[str]
    words: list[str]
    needs: str = ""


def answer(place: Path, target: str | None = None, recipe: str | None = None) -> Answer:
    """Args:
        place: a folder; or a file, of a table or of texts.
        target: the column to predict, of a table.
        recipe: the user's choice; None takes that of `lightspan.cli.any_folder.choices`.
    Raises: UserError that says what to do, for what cannot be trained on.
    """
    if not place.exists():
        raise UserError(f"--data {place} does not exist; name a folder with files of one kind")
    if not place.is_dir():
        return _of_file(place, target, recipe)
    found = survey(place)
    main = found.main()
    if main.kind.modality == "table":
        tables = [place / name for name in main.names]
        if len(tables) > 1:
            shown = ", ".join(one_line(table) for table in tables[:MOST_COLUMNS])
            raise UserError(f"{place} holds {len(tables):,} tables, and one is read; name it with --data: {shown}")
        return _of_table(tables[0], [main.said(), *found.lines(main)], target, recipe)
    if main.lacks:
        raise UserError(f"{place} holds {main.said()}; {main.lacks}")
    if main.kind.modality == "text":
        paths = [place / name for name in main.names]
        return _of_texts(place, paths, [main.said(), *found.lines(main)], recipe)
    classes = found.classes(main)
    _require_several(place, main)
    said = [main.said(), *([classes.said()] if main.kind.has_classes else []), *found.lines(main)]
    if classes.validates:
        said.append("the folder beside `train` validates")
    chosen, words = choice(main.kind.modality, _labels(classes)), [main.kind.option, typed(place)]
    if (longest := main.sizes.get("seconds", (0, SEGMENT_S))[1]) < SEGMENT_S:  # else all would be padded to it
        words.append(f"data.init_args.seconds={math.ceil(longest)}")
    return _taken(place, said, chosen, recipe, words)


def _of_file(path: Path, target: str | None, recipe: str | None) -> Answer:
    lower = path.name.lower()
    fits = [one for one in KINDS if lower.endswith(one.kind.endings)]
    modalities = [one.modality for one in fits]
    if "table" in modalities:
        return _of_table(path, ["1 table"], target, recipe)
    if modalities == ["text"]:
        return _of_texts(path, [path], ["1 text"], recipe)
    what = f"one {fits[0].one}" if fits else "a file of no kind that is read here"
    raise UserError(f"--data {path} is {what}; name the folder of many such files")


def _of_table(path: Path, said: list[str], target: str | None, recipe: str | None) -> Answer:
    try:
        columns = read_columns(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as a table: {error}") from error
    names = [*map(one_line, columns)]
    shown = ", ".join(names[:MOST_COLUMNS])
    shown += f" and {len(names) - MOST_COLUMNS:,} more" if len(names) > MOST_COLUMNS else ""
    said = [*said, f"columns: {shown}"]
    if target is None:
        raise UserError(f"{path} is a table; name the column to predict with --target: {shown}")
    if target not in columns:
        raise UserError(f"--target {one_line(target)} is no column of {path}; its columns are {shown}")
    form = "class" if _are_classes(columns[target]) else "number"
    return _taken(path, said, choice("table", form=form), recipe, ["--table", typed(path), "--target", target])


def _are_classes(cells: Cells) -> bool:
    """Of a target: text, or few whole numbers."""
    if cells.dtype.kind != "f":
        return True
    values = [float(value) for value in categories_of(cells)[0]]
    return len(values) <= CLASSES and all(value.is_integer() for value in values)


def _of_texts(place: Path, paths: Sequence[Path], said: list[str], recipe: str | None) -> Answer:
    lines = [path for path in paths if path.name.lower().endswith(LINES)]
    forms = {form_of_lines(path) for path in lines[:MOST_COLUMNS]} if len(lines) == len(paths) else {"texts"}
    if forms == {"conversations"}:
        if len(paths) > 1:
            raise UserError(f"{place} holds {len(paths):,} files of conversations, and one is read; join them into one")
        chosen = choice("text", form="conversations")
        needs = "" if Path("model").is_dir() else chosen.needs
        return _taken(place, said, chosen, recipe, [f"data.init_args.path={json.dumps(typed(paths[0]))}"], needs)
    if forms != {"texts"}:
        what = "are of several forms" if len(forms) > 1 else f"have {next(iter(forms))}"
        raise UserError(
            f"the lines of {paths[0] if len(paths) == 1 else place} {what}; docs/text.md has the form of texts, and "
            "docs/fine-tuning.md those of conversations and of texts with labels, which a classifier's recipe reads by "
            "data.class_path=lightspan.datamodules.text.labelled.LabelledTextFiles"
        )
    if len(paths) == 1 and not lines:
        raise UserError(
            f"{paths[0]} is one text, and whole texts are held out to validate on; cut it into several files, or into "
            'lines of a .jsonl file, {"text": "..."}'
        )
    words = [f"data.init_args.paths={json.dumps([typed(place)])}"]
    return _taken(place, said, choice("text", form="texts"), recipe, words)


def form_of_lines(path: Path) -> str:
    """What the first line of a .jsonl file has, in words."""
    try:
        with opened_regular(path) as file:
            start = file.read(2**20)
        found = json.loads(next(line for line in start.split(b"\n") if line.strip()))
    except (OSError, ValueError, StopIteration, RecursionError):
        return "no JSON object first"
    keys = found.keys() if isinstance(found, dict) else ()
    if "messages" in keys or {"prompt", "completion"} <= {*keys}:
        return "conversations"
    if "text" in keys:
        return "texts with labels" if "label" in keys else "texts"
    return "neither text nor messages"


def _labels(classes: Classes) -> str:
    if not classes.counts:
        return "none"
    return "many" if sum(classes.counts.values()) >= FEW_LABELS * len(classes.counts) else "few"


def _require_several(place: Path, main: FoundKind) -> None:
    if len(main.names) > 1 or main.kind.modality == "graph":  # of which a file may hold many
        return
    way_out = "name a folder with more of them"
    if main.kind.modality == "video":
        way_out += ", or train on its shots, with a recipe, --videos FOLDER and data.init_args.samples=shots"
    raise UserError(f"{place} holds {main.said()}, and some are held out to validate on; {way_out}")


def _taken(
    place: Path, said: Sequence[str], chosen: Choice, recipe: str | None, words: Sequence[str], needs: str = ""
) -> Answer:
    first, *others = said
    lines = [f"{one_line(place)}: {first}", *(f"  {one}" for one in others)]
    if recipe is None:
        lines += [f"takes {chosen.recipe}: {chosen.why}", f"  instead: {chosen.instead}".replace("`", "")]
    else:
        lines.append(f"takes {recipe}, as you say")
    lines.append(f"  settings of such data: docs/{chosen.page}; all methods: docs/which-method.md")
    return Answer(lines, [recipe or chosen.recipe, *words], "" if recipe else needs)


def typed(place: Path) -> str:
    """A place as an argument that is neither an option nor in a home folder, whatever it begins with."""
    return str(place.absolute() if str(place).startswith(("-", "~")) else place)


def command(words: Sequence[str]) -> str:
    """As it can be typed."""
    return shlex.join(["lightspan", "fit", *words])
