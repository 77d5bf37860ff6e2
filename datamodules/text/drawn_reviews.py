"""Reviews of books and of kitchen things, drawn by a grammar: two domains whose words of praise have nothing in common.

A review tells a thing, some of its parts with words of praise or blame that only its domain has, words that say
nothing, and, in a share of the reviews, what the writer does next, in words that both domains have. Who reads labelled
books alone knows nothing of a kitchen's words; that those stand beside what a writer of either domain does next is in
the raw texts.
"""

import numpy as np

from lightspan.core.errors import UserError
from lightspan.core.ranges import require_numbers
from lightspan.datamodules.text.domains import Domains, LabelledTexts, UnlabelledTexts

DOMAINS = ("books", "kitchen")
THINGS = {
    "books": ("novel", "memoir", "sequel", "paperback", "biography", "anthology"),
    "kitchen": ("kettle", "blender", "skillet", "toaster", "grater", "teapot"),
}
PARTS = {
    "books": ("plot", "dialogue", "chapter", "narrator", "prose", "ending"),
    "kitchen": ("handle", "lid", "blade", "motor", "coating", "spout"),
}
WORDS = {  # by domain, of blame and of praise
    "books": (
        ("dull", "predictable", "clumsy", "rambling", "shallow", "tedious", "wooden", "derivative"),
        ("gripping", "moving", "witty", "lyrical", "haunting", "vivid", "profound", "masterly"),
    ),
    "kitchen": (
        ("leaky", "flimsy", "rusty", "wobbly", "noisy", "brittle", "sticky", "blunt"),
        ("sturdy", "quiet", "sharp", "durable", "handy", "spotless", "precise", "efficient"),
    ),
}
AFTERWARDS = (
    ("regret", "refund", "complained", "returned", "disappointed", "warned"),
    ("recommend", "thanks", "smiled", "gifted", "delighted", "again"),
)
NEUTRAL = ("bought", "last", "month", "came", "blue", "cover", "second", "online", "box", "local", "shop", "cousin")


class DrawnReviews(Domains):
    """Labels are 0 for blame and 1 for praise.

    Args:
        size: reviews of each domain to learn from.
        test_size: others of the target to judge by.
        shared: share of the reviews that tell what the writer does next, in [0, 1].
        mixed: share of the words of praise and blame that say the contrary of the review's label, in [0, 1].
        source: `books` or `kitchen`; the other is the target.
        seed: >= 0.
    """

    def __init__(
        self,
        size: int = 2000,
        test_size: int = 1000,
        shared: float = 0.5,
        mixed: float = 0.0,
        source: str = "books",
        seed: int = 0,
    ) -> None:
        shares = 0 <= shared <= 1 and 0 <= mixed <= 1
        if min(size, test_size) < 1 or not shares or source not in DOMAINS or seed < 0:
            raise UserError(
                f"DrawnReviews size={size} and test_size={test_size} must be at least 1, shared={shared} and "
                f"mixed={mixed} in [0, 1], source={source!r} one of {', '.join(DOMAINS)}, and seed={seed} at least 0"
            )
        require_numbers(256 * len(DOMAINS) * (size + test_size), size=size, test_size=test_size)
        self.size, self.test_size, self.shared, self.mixed, self.seed = size, test_size, shared, mixed, seed
        self.names = {"source": source, "target": DOMAINS[1 - DOMAINS.index(source)]}

    def source(self) -> LabelledTexts:
        return self._drawn("source", 0, self.size)

    def target(self) -> UnlabelledTexts:
        return UnlabelledTexts(self._drawn("target", 1, self.size).texts)

    def target_test(self) -> LabelledTexts:
        return self._drawn("target", 2, self.test_size)

    def _drawn(self, which: str, stream: int, count: int) -> LabelledTexts:
        generator = np.random.default_rng((self.seed, stream))
        labels = (np.arange(count) % 2).tolist()
        return LabelledTexts([self._review(self.names[which], label, generator) for label in labels], labels)

    def _review(self, domain: str, label: int, generator: np.random.Generator) -> str:
        parts = PARTS[domain]
        of = generator.choice(len(parts), 2, replace=False)
        said = generator.choice(len(WORDS[domain][label]), 2, replace=False)
        sides = np.where(generator.random(2) < self.mixed, 1 - label, label)
        words = [WORDS[domain][side][place] for side, place in zip(sides, said, strict=True)]
        thing = THINGS[domain][int(generator.integers(len(THINGS[domain])))]
        first, second = (NEUTRAL[int(place)] for place in generator.choice(len(NEUTRAL), 2, replace=False))
        review = f"{first} {thing} {parts[of[0]]} {words[0]} {second} {parts[of[1]]} {words[1]}"
        if generator.random() < self.shared:
            afterwards = generator.choice(len(AFTERWARDS[label]), 2, replace=False)
            review += " so " + " and ".join(AFTERWARDS[label][int(place)] for place in afterwards)
        return review
