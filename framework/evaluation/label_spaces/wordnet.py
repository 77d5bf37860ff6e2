"""The nouns of WordNet as a tree over classes, from the files of a system package: no download, no other library.

Format: wndb(5WN) and senseidx of WordNet 3.0. Of a noun with several senses the first one counts, the most frequent, or
the one that is named: `crane#5`. ImageNet's names of classes, such as n02084071, are places in the file of version 3.0.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from lightspan.core.errors import UserError, one_line
from lightspan.core.files.atomic import expanded
from lightspan.core.files.foreign import content_of
from lightspan.evaluation.label_spaces.label_metrics import GraphMetric

FOLDERS = ("/usr/share/wordnet", "/usr/local/share/wordnet", "/usr/local/WordNet-3.0/dict", "/opt/wordnet/dict")
"""Where packages put it; Debian's is called wordnet-base."""


@dataclass(frozen=True)
class Nouns:
    """Meanings of nouns, by their place in data.noun, such as 2084071.

    Attributes:
        words: the first word of each meaning.
        above: the more general meanings of each, the first one first; none of the root.
        senses: of a word in lower case, with underscores, its meanings, the most frequent first.
    """

    words: Mapping[int, str]
    above: Mapping[int, tuple[int, ...]]
    senses: Mapping[str, tuple[int, ...]]

    def meaning(self, name: str) -> int:
        """Of "dog", "fire engine", "crane#5" or "n02084071". Raises: UserError for what WordNet does not have."""
        if name[:1] == "n" and name[1:].isdecimal():
            if (place := int(name[1:])) in self.words:
                return place
            raise UserError(
                f"this WordNet has no noun at {name}; names of ImageNet's classes are places in version 3.0, so "
                "install that one (Debian: wordnet-base)"
            )
        word, mark, sense = name.strip().replace(" ", "_").lower().partition("#")
        found = self.senses.get(word, ())
        number = int(sense) if sense.isdecimal() else 0 if mark else 1
        if not 1 <= number <= len(found):
            has = f"has {len(found)} senses of it" if found else "has no such noun"
            raise UserError(f"the class {one_line(name)!r}: WordNet {has}; name a noun, or a sense of one as crane#5")
        return found[number - 1]

    def chain(self, meaning: int) -> list[int]:
        """A meaning and all above it up to the root, by the first of those where there are several."""
        chain = [meaning]
        while above := self.above[chain[-1]]:
            chain.append(above[0])
        return chain

    @cached_property
    def _names(self) -> dict[int, str]:
        """A name of each meaning that leads back to it."""
        return {
            place: f"{word}#{number}" if number > 1 else word
            for word, places in self.senses.items()
            for number, place in enumerate(places, 1)
            if self.words[place].lower() == word
        }

    def name(self, meaning: int) -> str:
        return self._names.get(meaning, f"n{meaning:08d}").replace("_", " ")


def read_nouns(folder: str | None = None) -> Nouns:
    """The nouns in `data.noun` and `index.noun` of a folder; None searches the usual ones.

    Raises: UserError if they are not there or not of this format.
    """
    places = [Path(place) for place in FOLDERS] if folder is None else [expanded(folder, "folder")]
    found = next(
        (place for place in places if (place / "data.noun").is_file() and (place / "index.noun").is_file()), None
    )
    if found is None:
        raise UserError(
            f"there is no WordNet (data.noun and index.noun) in {', '.join(map(str, places))}; install the system "
            "package wordnet-base, or name its folder"
        )
    try:
        words, above = _meanings(content_of(found / "data.noun").decode(errors="replace").splitlines())
        senses = _senses(content_of(found / "index.noun").decode(errors="replace").splitlines())
        if not words or any(place not in words for place_s in (*senses.values(), *above.values()) for place in place_s):
            raise ValueError("meanings are missing")
    except (ValueError, IndexError) as error:
        raise UserError(f"{found} is not a complete WordNet ({error}); install wordnet-base again") from error
    return Nouns(words, above, senses)


def wordnet_tree(classes: Sequence[str], nouns: Nouns, only_classes: bool = True) -> GraphMetric:
    """The tree that classes span: each and all above it, by edges of length 1, up to the lowest meaning above them all.
    Classes are labels, in their order and under their names; without `only_classes` what is above them follows.

    Raises: UserError for classes that WordNet does not have, or two of one meaning.
    """
    meanings = [nouns.meaning(name) for name in classes]
    names: dict[int, str] = {}
    for name, meaning in zip(classes, meanings, strict=True):
        if meaning in names:
            raise UserError(
                f"the classes {one_line(names[meaning])!r} and {one_line(name)!r} mean the same in WordNet; name "
                "another sense of one of them, as crane#5"
            )
        names[meaning] = name
    chains = [nouns.chain(meaning) for meaning in meanings]
    shared = set(chains[0]).intersection(*chains) if chains else set()
    top = next((meaning for meaning in chains[0] if meaning in shared), None) if chains else None
    edges: dict[tuple[int, int], None] = {}
    for chain in chains:
        below = chain[: chain.index(top) + 1] if top is not None else chain
        edges |= dict.fromkeys(pairwise(below))
    taken = set(classes)
    for meaning in dict.fromkeys(end for edge in edges for end in edge):
        if meaning not in names:
            own = nouns.name(meaning)
            names[meaning] = own if own not in taken else f"n{meaning:08d}"
    return GraphMetric([(names[one], names[other]) for one, other in edges], None, classes, only_classes)


def _meanings(lines: Iterable[str]) -> tuple[dict[int, str], dict[int, tuple[int, ...]]]:
    words, above = {}, {}
    for line in lines:
        if line.startswith("  ") or not line.strip():
            continue  # the licence
        fields = line.split()
        place, count = int(fields[0]), int(fields[3], 16)
        words[place] = fields[4]
        first = 4 + 2 * count  # of the pointers' number
        pointers = [fields[first + 1 + 4 * i : first + 5 + 4 * i] for i in range(int(fields[first]))]
        above[place] = tuple(int(to) for sign, to, kind, _ in pointers if sign in ("@", "@i") and kind == "n")
    return words, above


def _senses(lines: Iterable[str]) -> dict[str, tuple[int, ...]]:
    senses = {}
    for line in lines:
        if line.startswith("  ") or not line.strip():
            continue
        fields = line.split()
        senses[fields[0]] = tuple(int(place) for place in fields[len(fields) - int(fields[2]) :])
    return senses
