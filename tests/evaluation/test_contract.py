"""Every estimator that is found: JSON there and back, half precision, degenerate inputs, and nothing kept."""

import importlib
import inspect
import json
import math
import pkgutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import nn

import lightspan.evaluation
from lightspan.core.errors import UserError
from lightspan.core.results import Result
from lightspan.datamodules.image.batch import ImageBatch
from lightspan.datamodules.loading.loader import EvaluationLoader
from lightspan.evaluation.augmentations.encoded_views import ViewFeatures
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.features.compared import ComparedFeatures
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.features.preprocessing_grid import Grid, GridCell
from lightspan.evaluation.features.stages import TextStages
from lightspan.evaluation.features.stream import FeatureStream
from lightspan.evaluation.graphs.collection import GraphCollection, PlainGraph
from lightspan.evaluation.label_saving.factor_world import FactorWorld
from lightspan.evaluation.label_spaces.label_metrics import ring
from lightspan.evaluation.protocol.subject import Judged, ProtocolSubject
from lightspan.evaluation.robustness.audited import AuditedEncoder
from lightspan.evaluation.syntax.code_features import CodeFeatures
from lightspan.evaluation.syntax.trees import SyntaxNode
from lightspan.evaluation.weights.merging_statistics import NetworkOnData
from lightspan.evaluation.weights.prompts import DrawnImages, Prompts
from lightspan.merging.models import Held
from lightspan.merging.weights import Weights

ROWS, WIDTH = 60, 5
QUICK = {
    "LinearProbe": {"max_iterations": 10},
    "AttentiveProbe": {"steps": 3},
    "LinearSegmentation": {"max_iterations": 10},
    "AlignPairs": {"components": (1, 4), "ridges": (0.0, 0.1), "folds": 2},
    "LabelSaving": {"max_iterations": 5, "draws": 2},
    "ASTProbe": {"epochs": 2},
    "MLEThenERM": {"unlabelled": (10, 20), "labels": (5, 10), "seeds": 2},
    "UniversalPerturbation": {"steps": 2, "hardening_steps": 1},
    "ImageNetProtocol": {"rates": (0.01, 0.1), "epochs": 1, "tuning_epochs": (1, 1)},
}  # where a fit would look long for what has no end, or chooses among much


def found() -> Iterator[type[Estimator]]:
    for info in pkgutil.walk_packages(lightspan.evaluation.__path__, "lightspan.evaluation."):
        for _, kind in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            if issubclass(kind, Estimator) and not inspect.isabstract(kind) and kind.__module__ == info.name:
                yield kind


ESTIMATORS = list(found())


class Bank(nn.Module):
    """The same numbers as 3x3 filters of one layer: rows are filled up with zeros, or cut, to 9."""

    def __init__(self, features: Features) -> None:
        super().__init__()
        x = features.x.flatten(1)
        self.weight = nn.Parameter(nn.functional.pad(x, (0, 9 - x.shape[1])).view(-1, 1, 3, 3))


class Block(nn.Module):
    """A feed-forward block whose weights are the same every time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights without numbers
            torch.manual_seed(0)
            layers = {"fc1": nn.Linear(width, 120), "act": nn.GELU(), "fc2": nn.Linear(120, 4)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


class Painter(nn.Module):
    """Draws ones."""

    def draw(self, label: torch.Tensor, shape: tuple[int, ...], *rest: Any, **named: Any) -> Iterator[torch.Tensor]:
        yield torch.ones(len(label), *shape)


class Rows(Prompts):
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def run(self, network: nn.Module, entering: Callable[[int], None]) -> None:
        entering(0)
        network(self.x.float())


class Attending(nn.Module):
    """One block of attention among two tokens of four numbers: what rows there are, filled up with zeros or cut."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.attn = Attention(4, num_heads=2)

    @property
    def feature_modules(self) -> list[nn.Module]:
        return [self]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().flatten(1)
        return self.attn(nn.functional.pad(x, (0, 8 - x.shape[1])).view(-1, 2, 4))


class Layer(nn.Module):
    """A linear layer of three classes that takes what rows there are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, 3 * width).view(3, width))
            self.linear.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.float())


class Wide(nn.Module):
    """A map of rows to as many numbers: themselves, at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() @ self.weight


def network_on(features: Features, network: nn.Module | None = None) -> NetworkOnData:
    batches = [{"x": x} for x in features.x.split(16)]
    return NetworkOnData(network or Layer(features.x.shape[-1]), batches, "x", torch.device("cpu"))


def weights_of(scale: float) -> Callable[[Features], Weights]:
    """The features as the tensor of a checkpoint, and what became of it."""
    return lambda features: Held({"w": scale * features.x.roll(int(scale), 0), "steps": torch.tensor(1)}, "memory")


def stream_of(features: Features) -> FeatureStream:
    """A task for each class that there is."""
    labels = [] if features.label_N is None else features.label_N.unique().tolist()
    return FeatureStream.by_class(features, features, [(label,) for label in labels if not isinstance(label, list)])


def stages_of(features: Features) -> TextStages:
    """Two domains of the same rows, whose classes have as many texts as rows."""
    return TextStages(("one", "two"), (features, features), ((features, features),) * 2)


def all_but_one_class(features: Features) -> Features:
    """Without the last class, which is then new."""
    return features.of_classes(features.classes().unique().tolist()[:-1])


def dense_of(features: Features) -> Features:
    """A row as one of four patches of a sample, its label as what each patch shows."""
    x, label = features.x, torch.zeros(0) if features.label_N is None else features.label_N
    whole = Features(torch.stack([x.roll(i, 0) for i in range(4)], dim=1), grid=(2, 2))
    if len(label) != len(x):
        return whole
    maps = torch.stack([label.roll(i, 0) for i in range(4)], dim=1).unflatten(1, (2, 2))
    fields = {"segmentation": maps, "objects": maps, "depth": 1.0 + maps, "clip": torch.arange(len(x)) // 5}
    return replace(whole, fields=fields)


def seen_of(features: Features) -> Features:
    """A row as a sighting of who its label says, before one of two cameras."""
    fields = {} if features.label_N is None else {"identity": features.label_N}
    return replace(features, fields=fields | {"camera": torch.arange(len(features)) % 2})


def filmed_of(features: Features) -> Features:
    """A row as a picture of the tracklet that its label says, in one of two videos."""
    fields = {} if features.label_N is None else {"tracklet": features.label_N}
    return replace(features, fields=fields | {"camera": torch.arange(len(features)) % 2})


def graphs_of(features: Features) -> GraphCollection:
    """A row as a node, joined to those that point the same way."""
    x = features.x.flatten(1).float().cpu().nan_to_num()
    joined = (x.sign() @ x.sign().T > 0).fill_diagonal_(False)
    return GraphCollection((PlainGraph(len(x), joined.nonzero().numpy()),) if len(x) else ())


def grid_of(features: Features) -> Grid:
    """A cell whose bank and query are these."""
    stated = {"bands": None, "size": 8, "normalisation": {"name": "divided"}}
    features = replace(features, key=json.dumps({"preprocessing": stated}))
    return Grid((GridCell("network", 8, "divided", "all", stated, features, features),))


def compared_of(features: Features) -> ComparedFeatures:
    """These as the reference, and as an encoder that sees them doubled."""
    both = {"reference": features, "twice": replace(features, x=2 * features.x)}
    return ComparedFeatures(both, both)


def audited_of(features: Features) -> AuditedEncoder:
    """Rows, brought into [0, 1], as pictures of one line."""
    rows = features.x.float().sigmoid()[:, None, None]
    label = features.label_N
    return AuditedEncoder(nn.Sequential(nn.Flatten(), Layer(features.x.shape[-1])), [], rows, rows, label, rows, label)


class Samples:
    """Rows, brought into [0, 1], as pictures of one line."""

    batch_type = ImageBatch

    def __init__(self, features: Features) -> None:
        self.x, self.label_N = features.x.float().sigmoid()[:, None, None], features.label_N

    def __len__(self) -> int:
        return len(self.x)

    def sample(self, index: int, seed: int) -> dict[str, torch.Tensor]:
        assert self.label_N is not None
        return {"image": self.x[index], "label": self.label_N[index], "index": torch.tensor(index)}


def subject_of(features: Features) -> ProtocolSubject:
    """A map of pictures of the rows, and as its floor the same."""
    samples = Samples(features)
    judged = Judged(nn.Sequential(nn.Flatten(), Wide(features.x.shape[-1])), features, features)
    return ProtocolSubject(judged, judged, samples, EvaluationLoader(samples, 16), batch_size=16)


def views_of(features: Features) -> ViewFeatures:
    """A row as one of three views of a sample, of which the others are those of its neighbours."""
    views = torch.stack([features.x.roll(i, 0) for i in range(3)], dim=1)
    return ViewFeatures({"rolled": replace(features, x=views)})


def code_of(features: Features) -> CodeFeatures:
    """A row as a word; each five are a text, whose inner node has two or three of them."""
    trees, layer = [], features.x
    for first in range(0, len(layer), 5):
        words = len(layer[first : first + 5])
        inner = tuple(range(min(2 + first % 2, words)))
        trees.append(SyntaxNode("A", (SyntaxNode("B", inner), *range(len(inner), words))))
    return CodeFeatures(tuple(trees), {0: layer, 1: layer.flip(0)}, {"doubled": {1: 2 * layer}})


OF: dict[type, Callable[[Features], Any]] = {
    Features: lambda features: features,
    AuditedEncoder: audited_of,
    ProtocolSubject: subject_of,
    ComparedFeatures: compared_of,
    ViewFeatures: views_of,
    FactorWorld: lambda features: FactorWorld(4, 1),
    NetworkOnData: network_on,
    FeatureStream: stream_of,
    CodeFeatures: code_of,
    TextStages: stages_of,
    Grid: grid_of,
}
"""What an estimator takes, made of the same features, by type."""

GIVEN: dict[str, dict[str, Callable[[Features], Any]]] = {
    "AttentionPatterns": {"network": lambda features: network_on(features, Attending())},
    "Interference": {"base": weights_of(1), "one": weights_of(2), "two": weights_of(4)},
    "FilterStatistics": {"first": Bank, "second": Bank},
    "GDABaseToNew": {
        "bank": all_but_one_class,
        **{name: lambda features: features for name in ("val", "query", "text")},
    },
    "WeightAudit": {"a": weights_of(1), "b": weights_of(2)},
    "MemorisedNeurons": {
        "network": lambda features: Block(features.x.shape[-1]),
        "target": lambda features: Rows(features.x),
        "base": lambda features: Rows(features.x[:1]),
    },
    **{
        name: {"bank": dense_of, "query": dense_of}
        for name in ("LinearSegmentation", "DepthOrder", "PromptIoU", "LabelPropagation")
    },
    "CrossCameraRetrieval": {"bank": seen_of, "query": seen_of},
    "MineIdentities": {"features": filmed_of},
    "Loki": {
        "bank": lambda features: features,
        "query": lambda features: features,
        "metric": lambda features: ring(12),
    },
    "W2PGNN": {name: lambda features: graphs_of(features) for name in ("downstream", "one", "two")},
    "ExtractionAttack": {
        "network": lambda features: Painter(),
        "prompts": lambda features: DrawnImages([0, 1, 2], (1, 1, features.x.shape[-1]), steps=1, first=1),
        "images": lambda features: features,
    },
}
"""The same by estimator and name, for those whose types do not say enough."""


def inputs(kind: type[Estimator], features: Features) -> dict[str, Any]:
    """The same features for every input, or what is made of them."""
    if made := GIVEN.get(kind.__name__):
        return {name: make(features) for name, make in made.items()}
    taken = {name: p.annotation for name, p in inspect.signature(kind.fit).parameters.items() if name != "self"}
    assert set(taken.values()) <= OF.keys(), f"{kind.__name__} takes {taken}: give the suite such inputs here"
    return {name: OF[annotation](features) for name, annotation in taken.items()}


def numbers(given: dict[str, Any]) -> list[torch.Tensor]:
    """All that inputs hold, one after the other."""
    return [
        tensor
        for one in given.values()
        for tensor in (one.state_dict().values() if isinstance(one, nn.Module) else [getattr(one, "x", torch.zeros(0))])
    ]


def usual(dtype: torch.dtype = torch.float32) -> Features:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(3, (ROWS,), generator=generator)
    x = torch.randn(ROWS, WIDTH, generator=generator) + label[:, None]
    return Features(x.to(dtype), label, torch.arange(ROWS))


def of(x: torch.Tensor, label: torch.Tensor | None = None) -> Features:
    return Features(x, torch.arange(len(x)) % 3 if label is None else label, torch.arange(len(x)))


DEGENERATE = {
    "no row": of(torch.zeros(0, WIDTH)),
    "one row": of(torch.ones(1, WIDTH)),
    "two rows": of(torch.tensor([[0.0, 1.0], [1.0, 0.0]])),
    "one class": of(usual().x, torch.zeros(ROWS, dtype=torch.int64)),
    "a class of one sample": of(usual().x, (torch.arange(ROWS) == 7).long()),
    "classes left out": of(usual().x, 5 + 3 * (torch.arange(ROWS) % 2)),
    "constant features": of(torch.full((ROWS, WIDTH), 0.1)),
    "one constant feature": of(torch.cat([usual().x, torch.full((ROWS, 1), 1e6)], dim=1)),
    "zeros": of(torch.zeros(ROWS, WIDTH)),
    "a row of zeros": of(torch.cat([torch.zeros(1, WIDTH), usual().x])),
    "equal points": of(usual().x[:5].repeat(12, 1)),
    "a lattice": of(torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))),
    "more features than rows": of(torch.randn(7, 40, generator=torch.Generator().manual_seed(1))),
    "no feature": of(torch.zeros(ROWS, 0)),
    "denormal": of(usual().x * 1e-40),
    "huge": of(usual().x * 1e30),
    "NaN": of(torch.full((ROWS, WIDTH), torch.nan)),
    "infinite": of(torch.full((ROWS, WIDTH), torch.inf)),
    "positions kept": of(torch.ones(ROWS, 2, WIDTH)),
    "without labels": Features(usual().x),
    "labels below zero": of(usual().x, -torch.ones(ROWS, dtype=torch.int64)),
    "several labels a sample": of(usual().x, torch.ones(ROWS, 3, dtype=torch.int64)),
}


WRONG = {
    "CompareHead": [{"l2": wrong} for wrong in (0.0, -1.0, math.nan, math.inf)],
    "KNN": [{"k": 0}, {"k": -3}, {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": math.nan}],
    "LinearProbe": [
        *({"l2": wrong} for wrong in (0.0, -1.0, math.nan, math.inf, (), (1.0, 0.0))),
        {"max_iterations": 0},
    ],
    "AttentiveProbe": [
        *({"rate": wrong} for wrong in (0.0, -1.0, math.nan, math.inf, (), (1.0, 0.0))),
        *({name: 0} for name in ("steps", "batch_size", "heads")),
        *({"weight_decay": wrong} for wrong in (-1.0, math.nan, math.inf)),
        {"seed": -1},
    ],
    **{
        name: [{"l2": 0.0}, {"l2": math.nan}, {"most_patches": 0}, *more]
        for name, more in (
            ("LinearSegmentation", [{"ignore_label": -1}, {"max_iterations": 0}]),
            ("DepthOrder", []),
        )
    },
    "PromptIoU": [*({"thresholds": wrong} for wrong in (1.0, -1.1, math.nan, ())), {"ignore_label": -1}],
    "W2PGNN": [{"cells": 0}, {"clusters": 0}],
    "ASTProbe": [
        *({name: 0} for name in ("dimensions", "epochs", "patience", "batch_size")),
        *({"rate": wrong} for wrong in (0.0, -1.0, math.nan, math.inf)),
        *({"orthogonal": wrong} for wrong in (-1.0, math.nan, math.inf)),
        *({name: -1} for name in ("seed", "rate_patience")),
    ],
    "LabelPropagation": [
        *({name: 0} for name in ("context", "neighbours")),
        *({name: wrong} for name in ("radius", "temperature") for wrong in (0.0, -1.0, math.nan, math.inf)),
    ],
    "ResizeNormalise": [{"k": 0}, {"k": -1}],
    "AttentionPatterns": [*({"hybrid": wrong} for wrong in (-0.1, 1.1, math.nan)), {"most": 0}],
    "AlignPairs": [
        *({name: 0} for name in ("folds", "top", "most")),
        {"seed": -1},
        *({"components": wrong} for wrong in ((), (0,))),
        *({"ridges": wrong} for wrong in ((), (-1.0,), (math.nan,), (math.inf,))),
    ],
    "Loki": [{name: wrong} for name in ("scale", "l2", "temperature") for wrong in (0.0, -1.0, math.nan, math.inf)],
    "MineIdentities": [
        *({name: wrong} for name in ("core", "within", "across") for wrong in (-1.1, 1.1, math.nan)),
        *({name: -1} for name in ("near", "far")),
        *({"noisy": wrong} for wrong in (0.0, -1.0, math.nan, math.inf)),
    ],
    "GDAWithText": [{"scale": wrong} for wrong in (0.0, -1.0, math.nan, math.inf)],
    "GDABaseToNew": [
        *({"scale": wrong} for wrong in (0.0, -1.0, math.nan, math.inf)),
        {"neighbours": 0},
        {"copies": -1},
    ],
    "KMeansClusters": [{"clusters": 0}, {"seed": -1}],
    "SpectralClusters": [{"clusters": 0}, {"neighbours": 0}, {"seed": -1}],
    "TwoNN": [{"rule": "guess"}, {"discard": 1.0}, {"discard": -0.1}, {"discard": math.nan}, {"most": 2}],
    "Spectrum": [{"shown": 0}],
    "Gride": [{"furthest": 1}, {"most": 9}],
    "DecimatedTwoNN": [{"fewest": 9}, {"seed": -1}, {"most": 9}],
    "InformationImbalance": [{"neighbours": 0}, {"most": 2}],
    "ConvergentLearning": [
        *({name: 0} for name in ("clusters", "directions", "mapped")),
        {"most": 9},
        {"seed": -1},
    ],
    "LabelSaving": [
        *({"l2": wrong} for wrong in (0.0, -1.0, math.nan, math.inf, (), (1.0, 0.0))),
        *({"labels": wrong} for wrong in ((), (1, 5), (5, 4), (5, 5))),
        *({name: 0} for name in ("draws", "max_iterations")),
        {"seed": -1},
    ],
    "MLEThenERM": [
        *({name: wrong} for name in ("unlabelled", "labels") for wrong in ((), (1, 5), (5, 4))),
        {"labels": (5,)},
        *({name: 0} for name in ("rank", "seeds")),
    ],
    "UniversalPerturbation": [
        *({name: 0} for name in ("steps", "k")),
        {"batch_size": 1},
        *({name: -1} for name in ("hardening_steps", "seed")),
        *({name: wrong} for name in ("alpha", "radius") for wrong in (-1.0, math.nan, math.inf)),
        *({name: wrong} for name in ("temperature", "hardening_rate", "l2") for wrong in (0.0, math.nan, math.inf)),
        *({"pruned": wrong} for wrong in (-0.1, 1.0, math.nan)),
    ],
    "ImageNetProtocol": [
        *({name: 0} for name in ("k", "epochs")),
        *({"temperature": wrong} for wrong in (0.0, -1.0, math.nan, math.inf)),
        *({"rates": wrong} for wrong in ((0.0,), (0.1, math.nan), (math.inf,))),
        *({name: wrong} for name in ("momentum", "warmup") for wrong in (-0.1, 1.0, math.nan)),
        *({"held_out": wrong} for wrong in (0.0, 1.0, math.nan)),
        *({"shares": wrong} for wrong in ((0.0, 0.1), (0.1, 1.1), (0.1, math.nan), (0.1, 0.1), (0.1,))),
        {"tuning_epochs": (0, 1)},
        {"seed": -1},
    ],
    "AugmentationComplexity": [*({name: 0} for name in ("draws", "points")), {"most": 3}, {"seed": -1}],
    "CapturedTrace": [{"directions": 0}, {"seed": -1}],
    "WeightAudit": [
        *({name: 0} for name in ("rank", "top", "largest")),
        *({"epsilon": wrong} for wrong in (0.0, 1.0, math.nan)),
    ],
    "Interference": [{"rank": 0}, {"density": 0.0}, {"density": 1.5}, {"density": math.nan}],
    "DiagonalFisher": [{"most": 0}],
    "InputGrams": [{"most": 0}],
    "MemorisedNeurons": [
        *({"share": wrong} for wrong in (0.0, 1.1, math.nan)),
        *({"vote": wrong} for wrong in (-0.1, 1.0, math.nan)),
    ],
    "ExtractionAttack": [{"radius": wrong} for wrong in (0.0, -1.0, math.nan, math.inf)],
    "FilterStatistics": [
        *({"zero": wrong} for wrong in (0.0, 1.0, math.nan)),
        *({"sparse_from": wrong} for wrong in (0.0, 1.1, math.nan)),
        *({"repeated_below": wrong} for wrong in (-0.1, 1.0, math.nan)),
        *({name: 0} for name in ("bins", "resamples")),
        {"seed": -1},
    ],
}
"""Settings out of range; each number that an estimator takes is among them."""

COMPUTED = {
    "LabelSaving": {
        *("a class of one sample", "classes left out", "constant features", "zeros", "a row of zeros"),
        *("equal points", "a lattice", "denormal", "huge", "one constant feature"),
    },
    "MLEThenERM": {"no row", "NaN"},
    "ASTProbe": {
        *("one class", "classes left out", "constant features", "zeros", "a row of zeros", "equal points", "a lattice"),
        *("denormal", "huge", "one constant feature", "without labels", "labels below zero"),
    },
    "AugmentationComplexity": {
        *("one class", "constant features", "zeros", "a row of zeros", "equal points", "a lattice", "denormal", "huge"),
        *("more features than rows", "positions kept", "without labels", "labels below zero"),
    },
    "CapturedTrace": {
        *("two rows", "one class", "a class of one sample", "classes left out", "a row of zeros", "equal points"),
        *("a lattice", "denormal", "huge", "without labels"),
    },
    "TwoNN": {"one class", "classes left out", "a row of zeros", "more features than rows", "without labels"},
    "Gride": {"one class", "classes left out", "a row of zeros", "one constant feature", "denormal", "without labels"},
    "DecimatedTwoNN": {"one class", "classes left out", "a row of zeros", "one constant feature", "without labels"},
    "AlignPairs": {
        *("one class", "classes left out", "one constant feature", "a row of zeros", "equal points", "a lattice"),
        *("more features than rows", "denormal", "huge", "without labels", "labels below zero"),
    },
    "CKA": {"one class", "classes left out", "a row of zeros", "equal points", "a lattice", "denormal", "huge"},
    "InformationImbalance": {
        "one class",
        "constant features",
        "zeros",
        "equal points",
        "a lattice",
        "denormal",
        "huge",
    },
    "ConvergentLearning": {
        *("one class", "classes left out", "one constant feature", "a row of zeros", "equal points", "a lattice"),
        *("denormal", "huge", "without labels", "several labels a sample"),
    },
    "WeightAudit": {
        *("no row", "one row", "two rows", "constant features", "zeros", "a row of zeros", "a lattice", "no feature"),
        *("more features than rows", "denormal", "huge", "NaN", "infinite", "positions kept", "without labels"),
    },
    "Spectrum": {"one row", "one class", "constant features", "zeros", "a lattice", "denormal", "without labels"},
    "FrechetDistance": {"two rows", "one class", "constant features", "zeros", "a lattice", "without labels"},
    "AttentionPatterns": {
        *("one row", "two rows", "one class", "classes left out", "constant features", "zeros", "a row of zeros"),
        *("equal points", "a lattice", "no feature", "denormal", "positions kept", "without labels"),
    },
    "Loki": {
        *("one row", "two rows", "one class", "a class of one sample", "classes left out", "constant features"),
        *("zeros", "a row of zeros", "equal points", "a lattice", "no feature", "denormal", "huge"),
    },
    "SpectrumSpread": {
        *("one row", "two rows", "one class", "constant features", "zeros", "a row of zeros", "a lattice", "denormal"),
        *("huge", "more features than rows", "without labels", "labels below zero", "several labels a sample"),
    },
    "MineIdentities": {
        *("one row", "two rows", "one class", "a class of one sample", "classes left out", "constant features"),
        *("zeros", "a row of zeros", "equal points", "a lattice", "no feature", "denormal", "huge"),
    },
    "Interference": {"one row", "one class", "constant features", "zeros", "a lattice", "denormal", "huge"},
    "DiagonalFisher": {"one row", "one class", "constant features", "zeros", "a lattice", "without labels"},
    "InputGrams": {"one row", "one class", "constant features", "zeros", "a lattice", "denormal", "without labels"},
    "MemorisedNeurons": {"one row", "constant features", "zeros", "denormal", "huge", "without labels", "no feature"},
    "ExtractionAttack": {"constant features", "zeros", "a row of zeros", "equal points", "a lattice", "denormal"},
    "FilterStatistics": {
        *("one row", "one class", "classes left out", "constant features", "zeros", "a row of zeros", "a lattice"),
        *("more features than rows", "no feature", "denormal", "huge", "positions kept", "without labels"),
    },
    "KMeansClusters": {"one class", "a class of one sample", "classes left out", "constant features", "a lattice"},
    "SpectralClusters": {"one row", "two rows", "one class", "classes left out", "constant features", "a lattice"},
    "NMC": {
        "one row",
        "two rows",
        "one class",
        "a class of one sample",
        "classes left out",
        "constant features",
        "zeros",
    },
    "GDA": {"one row", "two rows", "one class", "a class of one sample", "constant features", "zeros", "equal points"},
    "GDAWithText": {"one row", "two rows", "one class", "a class of one sample", "constant features", "zeros"},
    "GDABaseToNew": {"a class of one sample", "classes left out", "constant features", "zeros", "a lattice"},
    "ClassIncremental": {"one row", "two rows", "one class", "a class of one sample", "constant features", "zeros"},
    "CrossDomain": {"one row", "two rows", "one class", "a class of one sample", "constant features", "zeros"},
    "KNN": {"one class", "a class of one sample", "constant features", "zeros", "a lattice", "denormal", "huge"},
    "ResizeNormalise": {"one class", "a class of one sample", "constant features", "zeros", "a lattice", "denormal"},
    "CompareHead": {"one row", "one class", "a class of one sample", "constant features", "zeros", "a lattice"},
    "LinearProbe": {"one row", "one class", "a class of one sample", "constant features", "zeros", "a lattice"},
    "AttentiveProbe": {"one row", "one class", "constant features", "zeros", "a lattice", "denormal", "positions kept"},
    "LinearSegmentation": {"one row", "one class", "a class of one sample", "classes left out", "constant features"},
    "DepthOrder": {"one row", "one class", "constant features", "zeros", "equal points", "a lattice", "denormal"},
    "PromptIoU": {"one row", "one class", "constant features", "zeros", "a row of zeros", "a lattice", "huge"},
    "LabelPropagation": {"one row", "two rows", "one class", "constant features", "zeros", "a lattice", "huge"},
    "W2PGNN": {
        "one row",
        "two rows",
        "constant features",
        "zeros",
        "no feature",
        "denormal",
        "huge",
        "NaN",
        "infinite",
    },
    "UniversalPerturbation": {
        *("two rows", "a class of one sample", "classes left out", "constant features", "zeros"),
        *("one constant feature", "a row of zeros", "equal points", "a lattice", "more features than rows", "denormal"),
        "huge",
    },
    "ImageNetProtocol": {
        *("two rows", "a class of one sample", "classes left out", "constant features", "zeros", "a row of zeros"),
        *("one constant feature", "equal points", "a lattice", "more features than rows", "denormal", "huge"),
    },
    "CrossCameraRetrieval": {"no row", "one row", "one class", "constant features", "zeros", "denormal", "huge"},
}
"""Degenerate features that have an answer, which is to be given and not refused."""


def test_the_suite_sees_the_estimators() -> None:
    names = {kind.__name__ for kind in ESTIMATORS}
    assert {"TwoNN", "Spectrum", "FrechetDistance", "KNN", "LinearProbe"} <= names
    assert COMPUTED.keys() == names


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_settings_out_of_range_are_refused_when_an_estimator_is_made(kind: type[Estimator]) -> None:
    wrong = WRONG.get(kind.__name__, [])
    settings = {name: p.default for name, p in inspect.signature(kind).parameters.items() if name != "self"}
    numbers = {name for name, default in settings.items() if type(default) in (int, float)}
    assert numbers <= {name for one in wrong for name in one}, "give a wrong value of each number here"
    for one in wrong:
        with pytest.raises(UserError, match=f"{kind.__name__} {next(iter(one))}=.* must (be|lie)"):
            kind(**one)


@pytest.mark.sample(12)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_result_goes_to_json_and_comes_back_equal(kind: type[Estimator]) -> None:
    result = kind().fit(**inputs(kind, usual()))
    assert type(result).from_json(result.to_json()) == result
    document = json.loads(json.dumps(result.document(), allow_nan=False))
    assert document["figures"]
    for figure in result.figures():
        assert figure.name
        assert isinstance(figure.value, int | float)
    for name, tensor in result.tensors.items():
        assert tensor.isfinite().all(), name


@pytest.mark.sample(10)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_result_has_no_picture_or_a_png(kind: type[Estimator]) -> None:
    result = kind(**QUICK.get(kind.__name__, {})).fit(**inputs(kind, usual()))
    picture = result.picture("a title")
    assert picture is None or picture.startswith(b"\x89PNG")
    assert (picture is None) == (type(result).draw is Result.draw)


@pytest.mark.sample(12)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_bfloat16_features_give_nearly_the_figures_of_the_same_numbers_in_float32(kind: type[Estimator]) -> None:
    half = usual(torch.bfloat16)
    wide = Features(half.x.float(), half.label_N, half.index_N)
    figures = zip(kind().fit(**inputs(kind, half)).figures(), kind().fit(**inputs(kind, wide)).figures(), strict=True)
    for from_half, from_wide in figures:
        assert from_half.value == pytest.approx(from_wide.value, rel=1e-6, abs=1e-9)


@pytest.mark.sample(12)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_fit_keeps_nothing_and_answers_the_same_again(kind: type[Estimator]) -> None:
    estimator, given = kind(**QUICK.get(kind.__name__, {})), inputs(kind, usual())
    before, untouched = dict(vars(estimator)), numbers(inputs(kind, usual()))
    first = estimator.fit(**given)
    assert vars(estimator) == before
    assert estimator.fit(**given) == first
    assert all(map(torch.equal, numbers(given), untouched))


@pytest.mark.sample(9)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_degenerate_features_give_a_finite_result_or_one_clear_error(kind: type[Estimator]) -> None:
    for case, dtype in product(DEGENERATE, [torch.float32, torch.bfloat16]):
        features, shown = DEGENERATE[case], f"{case} in {dtype}"
        features = Features(features.x.to(dtype), features.label_N, features.index_N)
        said = ""
        try:
            result = kind(**QUICK.get(kind.__name__, {})).fit(**inputs(kind, features))
        except UserError as error:
            said = str(error)
        if said:
            assert case not in COMPUTED[kind.__name__], shown
            assert len(said) > 20, shown
            assert "\n" not in said, shown
        else:
            assert type(result).from_json(result.to_json()) == result, shown  # a Result is finite, see there
            assert all(tensor.isfinite().all() for tensor in result.tensors.values()), shown
