"""The methods of lightspan in the comparison: how each is built around a given encoder. A later one joins by one entry.

Widths of all projectors, predictors and prototype heads are equal (`HIDDEN`, `OUT`, `PROTOTYPES`), their depth is that
of the paper, and every other setting is the default of the method, except what the length of the run or the number of
patches decides: momenta of teachers, the queue, masks of 4 x 4 patches. Nothing was tuned for one method.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from lightspan.backbones.vision import SmallConvNet
from lightspan.backbones.vit import vit
from lightspan.methods.clustering.deepcluster import DeepCluster
from lightspan.methods.clustering.mlc import MLC
from lightspan.methods.clustering.swav import SwAV
from lightspan.methods.contrastive.hydra import Hydra
from lightspan.methods.contrastive.lejepa import LeJEPA
from lightspan.methods.contrastive.mixed_barlow_twins import MixedBarlowTwins
from lightspan.methods.contrastive.moco import MoCo
from lightspan.methods.contrastive.moco_v3 import MoCoV3
from lightspan.methods.contrastive.selfie import Selfie
from lightspan.methods.contrastive.sie import SIE
from lightspan.methods.contrastive.simclr import SimCLR
from lightspan.methods.contrastive.spectral import SpectralContrastive
from lightspan.methods.contrastive.supcon import SupCon
from lightspan.methods.contrastive.vicreg import VICReg
from lightspan.methods.distillation.byol import BYOL
from lightspan.methods.distillation.dino import DINO
from lightspan.methods.distillation.dinov2 import DINOv2
from lightspan.methods.distillation.ibot import IBOT
from lightspan.methods.distillation.mmc import MMC
from lightspan.methods.distillation.simsiam import SimSiam
from lightspan.methods.masked.cae import CAE
from lightspan.methods.masked.cropmae import CropMAE
from lightspan.methods.masked.i_jepa import IJEPA
from lightspan.methods.masked.mae import MAE
from lightspan.methods.masked.sit import SiT
from lightspan.methods.supervised.adsl import ADSL
from lightspan.methods.supervised.classifier import Classifier
from lightspan.methods.supervised.look import LOOK
from lightspan.nn.class_pairs import Arbitrary
from lightspan.nn.clustering.patch_codes import PatchCodes
from lightspan.nn.decoders.cross_decoder import CrossDecoder, CrossFirst
from lightspan.nn.decoders.latent_regressor import LatentDecoder, LatentRegressor
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.heads.attention_pool import SummaryTransformer
from lightspan.nn.heads.class_gates import ClassPairGate
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.nn.heads.hyper_linear import HyperLinear
from lightspan.nn.heads.projector import Projector
from lightspan.nn.heads.subspace_learners import SubspaceLearners
from lightspan.nn.masking.block_masks import BlockMasks
from lightspan.nn.masking.mask_samplers import RandomMasks
from lightspan.nn.masking.multi_block import MultiBlock
from lightspan.nn.relations import Difference, PlaneTurn, Relations
from lightspan.training.method import Method

ENCODERS = ("ViT", "conv net")
WIDTH, DEPTH, HEADS, GRID = 48, 3, 4, 4
CHANNELS, STAGES = 8, 4
HIDDEN, OUT, PROTOTYPES, DECODER = 256, 128, 128, 32
MOMENTUM, QUEUE, NEIGHBOURS = 0.95, 1024, 20
"""A teacher that looks back 20 steps: momenta of the papers are for runs of 100,000 steps and more."""
SPECTRAL_LENGTH = 10**0.5  # mu = 10, as HaoChen et al. have it
FROZEN = 0.1  # share of the run in which SwAV's prototypes keep their place
TEACHER = {"momentum": MOMENTUM, "final_momentum": 0.99}


class Task(NamedTuple):
    """What a method is built for.

    Attributes:
        encoder_name: one of `ENCODERS`.
        channels, side: of the pictures.
        classes: of the labels, which supervised methods see.
        images: training pictures.
    """

    encoder_name: str
    channels: int
    side: int
    classes: int
    images: int

    @property
    def patch(self) -> int:
        return self.side // GRID

    @property
    def patch_numbers(self) -> int:
        return self.patch**2 * self.channels

    def encoder(self, mask_token: bool = False) -> Any:
        """A transformer whose features are the mean over 4 x 4 patches, or four convolutions."""
        if self.encoder_name == "conv net":
            return SmallConvNet(self.channels, CHANNELS, STAGES)
        sizes = {"img_size": self.side, "patch_size": self.patch, "in_chans": self.channels}
        return vit(WIDTH, DEPTH, HEADS, **sizes, pool="avg", any_size=True, mask_token=mask_token)  # type: ignore[arg-type]


Build = Callable[..., Method]


@dataclass(frozen=True)
class Entry:
    """A method in the table.

    Args:
        build: (task, **optimisation) -> the method.
        views: kind of its views, see `pictures.views_of`.
        encoders: those that it can train.
    """

    build: Build
    views: str
    encoders: tuple[str, ...] = field(default=ENCODERS)


def projector(encoder: Any, layers: int = 1, **settings: Any) -> Projector:
    return Projector(encoder.num_features, [HIDDEN] * layers, OUT, **settings)


def predictor(**settings: Any) -> Projector:
    return Projector(OUT, [HIDDEN], OUT, **settings)


def dino_head(encoder: Any) -> DINOHead:
    return DINOHead(encoder.num_features, PROTOTYPES, (HIDDEN, HIDDEN), OUT)


def simclr(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return SimCLR(encoder, projector(encoder, batch_norm=True), **optimisation)


def moco(task: Task, **optimisation: Any) -> Method:
    encoder, settings = task.encoder(), {"queue": QUEUE, "momentum": MOMENTUM, "batch_statistics": True}
    return MoCo(encoder, projector(encoder, hidden_norm=False), **settings, **optimisation)


def moco_v3(task: Task, **optimisation: Any) -> Method:
    encoder, published = task.encoder(), {"bias": False, "batch_norm": True}
    frozen = ("*patch_embed*",) if task.encoder_name == "ViT" else ()
    heads = projector(encoder, 2, **published), predictor(**published)
    return MoCoV3(encoder, *heads, frozen, **TEACHER, **optimisation)


def barlow_twins(task: Task, lam_reg: float = 0.0, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return MixedBarlowTwins(encoder, projector(encoder, 2), lam_reg=lam_reg, normalize=True, **optimisation)


def mixed_barlow_twins(task: Task, **optimisation: Any) -> Method:
    return barlow_twins(task, lam_reg=4.0, **optimisation)


def selfie(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return Selfie(encoder, SummaryTransformer(encoder.num_features, 2, HEADS, HIDDEN), (GRID, GRID), **optimisation)


def vicreg(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return VICReg(encoder, projector(encoder, 2), **optimisation)


def spectral(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return SpectralContrastive(encoder, projector(encoder, 2), length=SPECTRAL_LENGTH, **optimisation)


def lejepa(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return LeJEPA(encoder, projector(encoder), directions=256, **optimisation)


def sie(task: Task, **optimisation: Any) -> Method:
    """Equivariant to crops and mirrors; the turn, which never happens here, tells the predictor a constant 1."""
    encoder = task.encoder()
    half = encoder.num_features // 2
    halves = [Projector(half, [HIDDEN] * 2, OUT // 2) for _ in range(2)]
    relation = Relations([PlaneTurn("angle"), Difference(["top", "left", "height", "width", "mirrored"], scale=0.5)])
    predictor = HyperLinear(relation.num_features, OUT // 2, OUT // 2)
    return SIE(encoder, *halves, predictor, relation, **optimisation)


def byol(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return BYOL(encoder, projector(encoder), predictor(), **TEACHER, **optimisation)


def simsiam(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return SimSiam(encoder, projector(encoder), predictor(), **optimisation)


def dino(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return DINO(encoder, dino_head(encoder), **TEACHER, **optimisation)


def ibot(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder(mask_token=True)
    return IBOT(encoder, [dino_head(encoder)], **TEACHER, **optimisation)


def dinov2(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder(mask_token=True)
    return DINOv2(encoder, dino_head(encoder), dino_head(encoder), **TEACHER, **optimisation)


def mmc(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    parts = projector(encoder), predictor(), dino_head(encoder), nn.Linear(WIDTH, task.patch_numbers)
    return MMC(encoder, *parts, **TEACHER, **optimisation)


def sit(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return SiT(encoder, projector(encoder, 2, bias=False, batch_norm=True), **TEACHER, **optimisation)


def swav(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return SwAV(encoder, projector(encoder), PROTOTYPES, freeze_prototypes=FROZEN, **optimisation)


def deepcluster(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return DeepCluster(encoder, projector(encoder), task.images, (PROTOTYPES,) * 3, **optimisation)


def mlc(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return MLC(encoder, projector(encoder), nn.Linear(OUT, OUT), **optimisation)


def mae(task: Task, **optimisation: Any) -> Method:
    return MAE(task.encoder(), MaskDecoder(WIDTH, task.patch_numbers, DECODER, 2, HEADS), **optimisation)


def cae(task: Task, **optimisation: Any) -> Method:
    regressor = LatentRegressor(WIDTH, depth=2, heads=HEADS, drop_path=0.0)
    decoder = LatentDecoder(WIDTH, PROTOTYPES, depth=2, heads=HEADS, drop_path=0.0)
    codes = PatchCodes(PROTOTYPES, (task.patch, task.patch), channels=task.channels)
    return CAE(task.encoder(), regressor, decoder, codes, BlockMasks(1.0, (0.5, 0.5), least_block=2), **optimisation)


def cropmae(task: Task, **optimisation: Any) -> Method:
    def block(width: int) -> CrossFirst:
        return CrossFirst(width, HEADS, 4 * DECODER)

    decoder = CrossDecoder(WIDTH, task.patch_numbers, DECODER, 2, block, place_other=False)
    return CropMAE(task.encoder(), decoder, RandomMasks(0.875), **optimisation)  # 2 of 16 patches are seen


def i_jepa(task: Task, **optimisation: Any) -> Method:
    parts = MaskDecoder(WIDTH, WIDTH, DECODER, 2, HEADS), MultiBlock(targets=2, context_keep=0.4)
    return IJEPA(task.encoder(), *parts, **TEACHER, **optimisation)


def classifier(task: Task, **optimisation: Any) -> Method:
    return Classifier(task.encoder(), task.classes, **optimisation)


def adsl(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return ADSL(encoder, SubspaceLearners(encoder.num_features, OUT), task.images, task.classes, **optimisation)


def supcon(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    return SupCon(encoder, projector(encoder), **optimisation)


def look(task: Task, **optimisation: Any) -> Method:
    encoder, settings = task.encoder(), {"queue": QUEUE, "momentum": MOMENTUM, "batch_statistics": True}
    return LOOK(encoder, projector(encoder), neighbours=NEIGHBOURS, **settings, **optimisation)


def hydra(task: Task, **optimisation: Any) -> Method:
    encoder = task.encoder()
    gate = ClassPairGate(task.classes, OUT, label_features=64, hidden=HIDDEN)
    return Hydra(encoder, projector(encoder, layer_norm=True), gate, Arbitrary(), **optimisation)


VIT = ("ViT",)
SELF_SUPERVISED = {
    "SimCLR": Entry(simclr, "two"),
    "MoCo v2": Entry(moco, "two"),
    "MoCo v3": Entry(moco_v3, "two"),
    "Barlow Twins": Entry(barlow_twins, "two"),
    "Mixed Barlow Twins": Entry(mixed_barlow_twins, "two"),
    "VICReg": Entry(vicreg, "two"),
    "spectral contrastive": Entry(spectral, "two"),
    "LeJEPA": Entry(lejepa, "crops"),
    "SIE": Entry(sie, "two"),
    "BYOL": Entry(byol, "two"),
    "SimSiam": Entry(simsiam, "two"),
    "DINO": Entry(dino, "crops"),
    "iBOT": Entry(ibot, "crops", VIT),
    "DINOv2": Entry(dinov2, "crops", VIT),
    "MMC": Entry(mmc, "two", VIT),
    "SwAV": Entry(swav, "crops"),
    "DeepCluster-v2": Entry(deepcluster, "crops"),
    "MLC": Entry(mlc, "two"),
    "MAE": Entry(mae, "one", VIT),
    "CAE": Entry(cae, "one", VIT),
    "CropMAE": Entry(cropmae, "nested", VIT),
    "I-JEPA": Entry(i_jepa, "one", VIT),
    "SiT": Entry(sit, "two", VIT),
    "Selfie": Entry(selfie, "one", ("conv net",)),
}
SUPERVISED = {
    "classifier": Entry(classifier, "one"),
    "SupCon": Entry(supcon, "two"),
    "LOOK": Entry(look, "two"),
    "Hydra": Entry(hydra, "two"),
    "ADSL": Entry(adsl, "one"),
}
ENTRIES = SELF_SUPERVISED | SUPERVISED
LEFT_OUT = {
    "CroCo": "learns from two photographs of one scene, and these pictures have one each",
    "DEPICT": "has an encoder of its own, the half of an autoencoder",
    "Prithvi": "learns from several dates of one place, and these pictures have one each",
    "BMMAE": "has an encoder of its own, with tokens for each modality of a volume, of which these pictures have one",
    "SelaVPR": "learns from photographs of one place, and these pictures have one each",
    "P2P": "learns to paint clouds of points, which these pictures are not",
    "AttributeMasking": "learns from graphs, which these pictures are not",
    "ESSL3D": "learns from sweeps of points, which these pictures are not",
    "I2PMAE": "learns from clouds of points, which these pictures are not",
    "Gaussian2Scene": "learns from clouds of points with posed pictures, which these are not",
    "PointMAE": "learns from clouds of points, which these pictures are not",
    "SatMAEpp": "has an encoder of its own, with tokens for groups of bands, of which these pictures have one",
    "POA": "trains a network that many smaller ones are cut out of, not a given encoder",
    "FST": "labels pixels, of which these pictures have no classes",
    "NMTune": "leaves its encoder as it is, and learns a classifier behind it",
    "SDFPT": "starts from the weights of an earlier run, and needs another run of them as its teacher",
    "CION": "learns who is on pictures of persons, of which these have none",
    "UNIP": "learns the attention of a larger network, which has to be trained first",
    "SLCA": "learns classes task by task, after a pre-training",
    "HeuristicMTL": "learns from tags, of which these pictures have none",
    "ScatSimCLR": "has an encoder of its own, which begins with fixed wavelets",
    "RSPNet": "compares clips of a video at several speeds, and these pictures do not move",
    "VJEPA": "hides tubes through the frames of a clip, and these pictures do not move",
    "SparK": "hides cells as large as the stride of its encoder, which pictures of 28 x 28 pixels are no multiple of",
    "UL2": "learns from text, which these pictures are not",
    "SPT": "trains networks for sequences, to which a picture is its pixels row by row",
    "InverseDynamics": "learns what an agent did between two images, and nobody acts in these pictures",
    "BehaviourCloning": "learns what an expert does, and nobody acts in these pictures",
    "Regressor": "predicts numbers, of which these pictures have none",
    "PointSegmenter": "labels points of clouds, which these pictures are not",
    "Segmenter": "labels pixels, of which these pictures have no classes",
    "VolumeFusion": "learns maps of an encoder and a decoder, and what is compared here is an encoder",
    "ModelsGenesis": "learns maps of an encoder and a decoder, and what is compared here is an encoder",
    "Joint2D3D": "learns from volumes and their slices, and these pictures are no volumes",
    "SequenceClassifier": "classifies sequences, with labels",
    "WordReader": "reads words, of which these pictures show none",
    "SMAE": "learns from text",
    "SoftCon": "learns from tags, of which these pictures have none",
    "TagClassifier": "learns from tags, of which these pictures have none",
    "TERA": "learns from sound",
    "NeRFMAE": "reads grids of colour and opacity of three axes, and these pictures have two",
    "VoCo": "learns where in a volume a crop lies, and these pictures are no volumes",
    "VoCoLarge": "learns where in a volume a crop lies, and these pictures are no volumes",
    "Starbucks": "learns from text",
    "SupReMix": "learns from labels that are numbers, of which these pictures have none",
}
"""Methods by the name of their class."""
OTHER_FAMILIES = {
    "bayesian": "trains sparse Bayesian classifiers",
    "compression": "makes trained networks smaller",
    "generative": "learns to make pictures",
    "image_text": "needs texts beside the pictures",
    "language": "learns from text",
    "merging": "merges trained networks",
}
"""Families of methods that learn no features of pictures alone."""
