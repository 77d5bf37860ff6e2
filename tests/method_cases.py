"""A small case of every training method, for properties that hold for all of them (tests/methods/test_every_*.py).

Networks have no BatchNorm and no dropout, so that rows of a batch do not see one another but where the objective says
so, and are trained by an optimiser that is linear in the gradient.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from method_runs import Pooled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import BertConfig, BertModel

import lightspan.methods
from lightspan.backbones import language
from lightspan.backbones.conv_autoencoder import ConvAutoencoder
from lightspan.backbones.denoisers import EncoderDecoder, PrefixDecoder
from lightspan.backbones.dense import UNet
from lightspan.backbones.diffusion import DiT
from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.elastic import ElasticViT
from lightspan.backbones.frames import FrameTransformer
from lightspan.backbones.generators import ConvGenerator
from lightspan.backbones.gin import GIN
from lightspan.backbones.grid_swin import GridSwin
from lightspan.backbones.image_language import ImageLanguage
from lightspan.backbones.language import llama, t5
from lightspan.backbones.pillars import Pillars
from lightspan.backbones.placed_vit import GridViT, GroupedViT, ModalityViT, SeriesViT, series_widths
from lightspan.backbones.point_pyramid import PointPyramid
from lightspan.backbones.point_vit import PointViT
from lightspan.backbones.scanned_unet import ScannedUNet
from lightspan.backbones.sequence import sequence_state_space, sequence_transformer
from lightspan.backbones.slices import SlicedVolumes, SliceEmbedding, SliceTransformer
from lightspan.backbones.sparse_unet import SparseUNet
from lightspan.backbones.swin3d import Swin3D, Swin3DEncoder
from lightspan.backbones.text import TextTransformer
from lightspan.backbones.timm_networks import timm_network
from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.video_unet import VideoUNet
from lightspan.backbones.vision import MLP
from lightspan.backbones.vit import vit
from lightspan.backbones.voxel_points import VoxelPoints
from lightspan.datamodules.text.denoising import Denoising
from lightspan.datamodules.text.documents import TextTokens
from lightspan.merging.models import GaussianModels
from lightspan.methods.bayesian.ssvi import SSVI
from lightspan.methods.clustering.deepcluster import DeepCluster
from lightspan.methods.clustering.depict import DEPICT
from lightspan.methods.clustering.joint_2d_3d import Joint2D3D
from lightspan.methods.clustering.mlc import MLC
from lightspan.methods.clustering.swav import SwAV
from lightspan.methods.compression.pela import PELA
from lightspan.methods.contrastive.e_ssl3d import ESSL3D
from lightspan.methods.contrastive.hydra import Hydra
from lightspan.methods.contrastive.lejepa import LeJEPA
from lightspan.methods.contrastive.mixed_barlow_twins import MixedBarlowTwins
from lightspan.methods.contrastive.moco import MoCo
from lightspan.methods.contrastive.moco_v3 import MoCoV3
from lightspan.methods.contrastive.rspnet import RSPNet
from lightspan.methods.contrastive.scatsimclr import ScatSimCLR
from lightspan.methods.contrastive.selfie import Selfie
from lightspan.methods.contrastive.sie import SIE
from lightspan.methods.contrastive.simclr import SimCLR
from lightspan.methods.contrastive.softcon import SoftCon
from lightspan.methods.contrastive.spectral import SpectralContrastive
from lightspan.methods.contrastive.starbucks import CoSENT, PairLoss, Retrieval, SentenceRanking, Starbucks
from lightspan.methods.contrastive.supcon import SupCon
from lightspan.methods.contrastive.supremix import SupReMix
from lightspan.methods.contrastive.vicreg import VICReg
from lightspan.methods.contrastive.voco import VoCo
from lightspan.methods.contrastive.voco_large import VoCoLarge
from lightspan.methods.distillation.byol import BYOL
from lightspan.methods.distillation.cion import CION
from lightspan.methods.distillation.dino import DINO
from lightspan.methods.distillation.dinov2 import DINOv2
from lightspan.methods.distillation.fst import FST
from lightspan.methods.distillation.ibot import IBOT
from lightspan.methods.distillation.mmc import MMC
from lightspan.methods.distillation.poa import POA
from lightspan.methods.distillation.sd_fpt import SDFPT
from lightspan.methods.distillation.simsiam import SimSiam
from lightspan.methods.distillation.unip import UNIP
from lightspan.methods.generative.denoising_diffusion import DenoisingDiffusion
from lightspan.methods.generative.hda import HDA
from lightspan.methods.generative.lcvd import LCVD
from lightspan.methods.generative.ponder_v2 import PonderV2
from lightspan.methods.generative.vae import VAE
from lightspan.methods.image_text.clip import CLIP
from lightspan.methods.image_text.dptr import DPTR
from lightspan.methods.image_text.m3i import M3I
from lightspan.methods.image_text.named_classes import NamedClasses
from lightspan.methods.image_text.pllava import PLLaVA
from lightspan.methods.image_text.pre import PRE
from lightspan.methods.language.causal_lm import CausalLM
from lightspan.methods.language.prompted_classifier import Discrepancy, PromptedClassifier
from lightspan.methods.language.text_classifier import TextClassifier
from lightspan.methods.masked.attribute_masking import AttributeMasking
from lightspan.methods.masked.bm_mae import BMMAE
from lightspan.methods.masked.cae import CAE
from lightspan.methods.masked.croco import CroCo
from lightspan.methods.masked.cropmae import CropMAE
from lightspan.methods.masked.gaussian2scene import Gaussian2Scene
from lightspan.methods.masked.i2p_mae import I2PMAE
from lightspan.methods.masked.i_jepa import IJEPA
from lightspan.methods.masked.mae import MAE
from lightspan.methods.masked.models_genesis import ModelsGenesis
from lightspan.methods.masked.nerf_mae import NeRFMAE
from lightspan.methods.masked.point_mae import PointMAE
from lightspan.methods.masked.prithvi import Prithvi
from lightspan.methods.masked.satmaepp import SatMAEpp
from lightspan.methods.masked.sit import SiT
from lightspan.methods.masked.smae import SMAE
from lightspan.methods.masked.spark import SparK
from lightspan.methods.masked.spt import SPT, LevelGuess, NextValue
from lightspan.methods.masked.tera import TERA
from lightspan.methods.masked.ul2 import UL2
from lightspan.methods.masked.v_jepa import VJEPA
from lightspan.methods.merging.adamerging import AdaMerging
from lightspan.methods.merging.atlas import Atlas
from lightspan.methods.merging.concrete_adamerging import ConcreteAdaMerging
from lightspan.methods.merging.concrete_arithmetic import ConcreteArithmetic
from lightspan.methods.robustness.nmtune import NMTune
from lightspan.methods.supervised.adsl import ADSL
from lightspan.methods.supervised.behaviour_cloning import BehaviourCloning
from lightspan.methods.supervised.classifier import Classifier
from lightspan.methods.supervised.heuristic_mtl import HeuristicMTL
from lightspan.methods.supervised.inverse_dynamics import InverseDynamics
from lightspan.methods.supervised.look import LOOK
from lightspan.methods.supervised.p2p import P2P
from lightspan.methods.supervised.point_segmenter import PointSegmenter
from lightspan.methods.supervised.regressor import Regressor
from lightspan.methods.supervised.segmenter import Segmenter
from lightspan.methods.supervised.selavpr import SelaVPR
from lightspan.methods.supervised.sequence_classifier import SequenceClassifier
from lightspan.methods.supervised.slca import SLCA
from lightspan.methods.supervised.tag_classifier import TagClassifier
from lightspan.methods.supervised.volume_fusion import VolumeFusion
from lightspan.methods.supervised.word_reader import WordReader
from lightspan.nn.audio.log_mel import LogMel
from lightspan.nn.bank_noise import BankNoise
from lightspan.nn.class_pairs import Arbitrary
from lightspan.nn.clustering.patch_codes import PatchCodes
from lightspan.nn.decoders.cross_decoder import CrossDecoder, CrossFirst, SelfFirst
from lightspan.nn.decoders.grid_unet import GridUNet
from lightspan.nn.decoders.grouped_mask_decoder import GroupedMaskDecoder
from lightspan.nn.decoders.latent_regressor import LatentDecoder, LatentRegressor
from lightspan.nn.decoders.letter_decoder import LetterDecoder
from lightspan.nn.decoders.mask_decoder import MaskDecoder
from lightspan.nn.decoders.modality_decoder import ModalityDecoder
from lightspan.nn.decoders.point_decoder import PointDecoder
from lightspan.nn.decoders.pyramid_decoder import PyramidDecoder
from lightspan.nn.decoders.unet_decoder import UNetDecoder
from lightspan.nn.decoders.unetr_decoder import UNETRDecoder
from lightspan.nn.decoders.upsampler import UpsamplerPyramid
from lightspan.nn.heads.action_head import ContinuousActions, DiscreteActions
from lightspan.nn.heads.attention_pool import FeatureMerge, SummaryTransformer
from lightspan.nn.heads.class_gates import ClassPairGate
from lightspan.nn.heads.dino_head import DINOHead
from lightspan.nn.heads.grassmann_head import GrassmannHead
from lightspan.nn.heads.hyper_linear import HyperLinear
from lightspan.nn.heads.local_features import UpConvolutions
from lightspan.nn.heads.mlp_head import MLPHead
from lightspan.nn.heads.projector import Projector
from lightspan.nn.heads.residual_mlp import ResidualMLP
from lightspan.nn.heads.reweighting import ReweightingHead
from lightspan.nn.heads.subspace_learners import SubspaceLearners
from lightspan.nn.hint_encoder import HintEncoder
from lightspan.nn.masking.block_masks import BlockMasks, RectangleMasks
from lightspan.nn.masking.coefficient_maps import CoefficientMaps
from lightspan.nn.masking.corruption import GroupCorruption
from lightspan.nn.masking.guided_masks import GuidedMasks
from lightspan.nn.masking.mask_samplers import CoarseMasks, RandomMasks
from lightspan.nn.masking.multi_block import MultiBlock
from lightspan.nn.masking.patch_mix import PatchMix
from lightspan.nn.masking.spectrogram_alterations import SpectrogramAlterations
from lightspan.nn.masking.tube_blocks import TubeBlocks
from lightspan.nn.masking.word_masks import NestedWordMasks
from lightspan.nn.points.edges import EdgeEncoder
from lightspan.nn.points.prompt import PointPrompt
from lightspan.nn.pretext import QuarterTurn
from lightspan.nn.relations import PlaneTurn
from lightspan.nn.sequences.joint_encoder import JointEncoder
from lightspan.nn.sequences.nested_sizes import FixedSizes
from lightspan.nn.sequences.token_lstm import TokenLSTM
from lightspan.nn.signed_fields import SignedField
from lightspan.nn.teachers.gram_anchor import GramAnchor
from lightspan.nn.teachers.image_guide import ImageGuide
from lightspan.objectives.moving_targets import MomentumFeatures
from lightspan.objectives.swapped_prediction import SwappedPrediction
from lightspan.optim.riemannian import RiemannianSGD
from lightspan.training.method import Method

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ROWS = 8
"""Of a batch that a run begins with, even on each of two ranks."""
IMAGES = 4 * ROWS
"""Of the batches of seeds below 4."""

AMONG_TARGETS = "each target token weighs the same: a micro-batch has spans of its own lengths"
AMONG_ANSWERS = "each token of an answer weighs the same: a micro-batch has answers of its own lengths"
AMONG_LETTERS = "each letter weighs the same: a micro-batch has words of its own lengths"
AMONG_TOKENS = "each masked token weighs the same: a micro-batch has as many as its texts are long"
AMONG_STEPS = "each hidden step weighs the same: a micro-batch has numbers of its own of them"
AMONG_CELLS = "each labelled cell weighs the same: a micro-batch has other recordings' bands"
AMONG_MODALITIES = "each hidden patch of a modality weighs the same: a micro-batch has numbers of its own of them"
AMONG_VOXELS = "the mean is over the filled voxels of a micro-batch, of which halves have unequal numbers"
AMONG_POINTS = "each point with a class weighs the same: a micro-batch has clouds of its own sizes"
AMONG_RAYS = "the means are over rays that have a part in them, of which halves have unequal numbers"
AMONG_ROWS = "the objective compares the rows of a batch: a micro-batch has fewer to compare with"
LOOKS_AHEAD = "the first micro-batch alone looks ahead"
MIXED = "images are mixed with others of their rank"
PER_RANK = "random numbers are those of the rank"


@dataclass(frozen=True)
class Case:
    """A method on a network of a few hundred weights.

    Args:
        build: settings (`optimizer` among them) -> the method, after the seed was set.
        batch: rows, seed -> a batch.
        halves_differ: why two micro-batches of half the rows do not train as one batch; None if they do.
        ranks_differ: why two ranks with half the rows each do not train as one process; None if they do.
        unsharded: what the method says where FSDP2 would split it; None if it trains there.
        refuses_low_rank: what it says of an optimiser that moves matrices in a subspace; None if that trains it.
        refuses_one_row: what it says of a batch of one row; None if it trains on that.
        refuses_no_row: what it says of a batch without rows; None if a rank may have one.
        forward_state: buffers that a forward pass changes, whether or not a step follows.
    """

    build: Callable[..., Method]
    batch: Callable[[int, int], dict[str, Any]]
    halves_differ: str | None = None
    ranks_differ: str | None = None
    unsharded: str | None = None
    refuses_low_rank: str | None = None
    refuses_one_row: str | None = None
    refuses_no_row: str | None = None
    forward_state: tuple[str, ...] = ()

    def make(self, optimizer: Any = SGD) -> Any:
        torch.manual_seed(0)
        return self.build(optimizer=optimizer)


def found() -> dict[str, type[Method]]:
    """Methods by their module in lightspan.methods: the first of each that trains."""
    named: dict[str, type[Method]] = {}
    for info in pkgutil.walk_packages(lightspan.methods.__path__, "lightspan.methods."):
        for one in vars(importlib.import_module(info.name)).values():
            if isinstance(one, type) and issubclass(one, Method) and one.__module__ == info.name:
                named.setdefault(info.name.removeprefix("lightspan.methods."), one)
    return named


METHODS = found()


def views(
    count: int = 2, smaller: int = 0, classes: int = 3, channels: int = 1
) -> Callable[[int, int], dict[str, Any]]:
    """`count` views of 8 x 8 pixels of each image and `smaller` ones of 4 x 4."""

    def made(rows: int, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        sides = [8] * count + [4] * smaller
        return {
            "views": [torch.randn(rows, 1, side, side, generator=generator) for side in sides],
            "label": (torch.arange(rows) + seed) % classes,
            "index": torch.arange(rows) + ROWS * seed,
        }

    return made


def sounds(rows: int, seed: int) -> dict[str, Any]:
    """Noise of two lengths, half a second and a fourth."""
    wave = torch.randn(rows, 500, generator=torch.Generator().manual_seed(seed + 200))
    length = 500 - 250 * (torch.arange(rows) % 2)
    wave = wave.masked_fill(torch.arange(500) >= length[:, None], 0)
    return {"wave": wave, "length": length, "index": torch.arange(rows) + ROWS * seed}


def placed_views(rows: int, seed: int) -> dict[str, Any]:
    """Two views and how each was turned, in degrees."""
    turns = 360 * torch.rand(rows, 2, 1, generator=torch.Generator().manual_seed(seed + 100))
    return views()(rows, seed) | {"parameters": turns}


def place_pairs(rows: int, seed: int) -> dict[str, Any]:
    """A query and a picture near it, rows a hundred units apart or in other regions."""
    aside = torch.randn(rows, 2, 2, generator=torch.Generator().manual_seed(seed + 100))
    place = 100.0 * torch.arange(rows)[:, None, None] + aside
    return views()(rows, seed) | {"places": place}


def base_crops(rows: int, seed: int) -> dict[str, Any]:
    """Three base crops, two others, and the share of each of these in each of the first."""
    overlap = torch.rand(rows, 2, 3, generator=torch.Generator().manual_seed(seed + 100)).log().softmax(dim=2)
    return views(5)(rows, seed) | {"overlap": overlap}


def domains(rows: int, seed: int) -> dict[str, Any]:
    """Images of two domains, and a class for each pixel of the first."""
    generator = torch.Generator().manual_seed(seed)
    image, target = (torch.randn(rows, 1, 8, 8, generator=generator) for _ in range(2))
    index = torch.arange(rows) + ROWS * seed
    return {"image": image, "target_image": target, "semantic": (image[:, 0] > 0.3).long() + 1, "index": index}


def images(labels: tuple[int, ...] = (0, 1, 2)) -> Callable[[int, int], dict[str, Any]]:
    def made(rows: int, seed: int) -> dict[str, Any]:
        given = views(1)(rows, seed)
        (image,) = given.pop("views")
        return given | {"image": image, "label": torch.tensor([labels[(i + seed) % len(labels)] for i in range(rows)])}

    return made


def pairs(rows: int, seed: int) -> dict[str, Any]:
    """Images and texts."""
    return images()(rows, seed) | texts(rows, seed)


def tagged_views(rows: int, seed: int) -> dict[str, Any]:
    """Two views, and three tags, of which some are not known."""
    tags, known = (torch.rand(2, rows, 3, generator=torch.Generator().manual_seed(seed)) < 0.6).long()
    return views()(rows, seed) | {"tags": tags * known, "tags_known": known}


def tagged(rows: int, seed: int) -> dict[str, Any]:
    """Three tags, all known."""
    tags = torch.rand(rows, 3, generator=torch.Generator().manual_seed(seed)) < 0.6
    return images()(rows, seed) | {"tags": tags.long()}


def texts(rows: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 7, (rows, 1), generator=generator)
    mask = (torch.arange(6) < length).long()
    return {
        "tokens": torch.randint(1, 20, (rows, 6), generator=generator) * mask,
        "mask": mask,
        "label": (torch.arange(rows) + seed) % 3,
        "index": torch.arange(rows) + ROWS * seed,
    }


def text_pairs(rows: int, seed: int) -> dict[str, Any]:
    """Queries with two documents each, and how alike a query and its first one are."""
    query, *documents = (texts(rows, seed + 100 * number) for number in range(3))
    stacked = {f"document_{name}": torch.stack([one[name] for one in documents], 1) for name in ("tokens", "mask")}
    score = {"score": ((torch.arange(rows) + seed) % 4).float()}
    return {name: query[name] for name in ("tokens", "mask", "index")} | stacked | score


def words_of_texts(rows: int, seed: int) -> dict[str, Any]:
    """Texts whose words have two tokens or, at the end, one, without special tokens."""
    given = texts(rows, seed)
    word = (torch.arange(6) // 2).masked_fill(given["mask"] == 0, -1)
    return {name: given[name] for name in ("tokens", "mask", "index")} | {"word": word}


def prompts(rows: int, seed: int) -> dict[str, Any]:
    """Prompts of two labels, one of them of two words, each beside one of another domain."""
    own, other = texts(rows, seed), texts(rows, seed + 100)
    choices = torch.tensor([[4, 1, 0], [5, 6, 1]])
    told = {
        "choices": choices,
        "decoder_inputs": torch.tensor([[0, 4, 0], [0, 5, 6]]),
        "choice_segments": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    return {
        "inputs": own["tokens"],
        "input_segments": own["mask"],
        **{name: field.expand(rows, 2, 3) for name, field in told.items()},
        "target_inputs": other["tokens"],
        "target_input_segments": other["mask"],
        "label": (torch.arange(rows) + seed) % 2,
        "index": own["index"],
    }


def partly_labelled(rows: int, seed: int) -> dict[str, Any]:
    """Pairs of which some have a class, some a caption, some both and some neither."""
    known = {"caption_known": torch.arange(rows) % 2, "label_known": torch.arange(rows) // 2 % 2}
    return pairs(rows, seed) | known


def words(rows: int, seed: int) -> dict[str, Any]:
    """Pictures of words of one to four letters."""
    length = torch.randint(1, 5, (rows, 1), generator=torch.Generator().manual_seed(seed + 100))
    letters = torch.randint(1, 6, (rows, 4), generator=torch.Generator().manual_seed(seed + 200))
    return images()(rows, seed) | {"characters": letters * (torch.arange(4) < length)}


def spelled_words(rows: int, seed: int) -> dict[str, Any]:
    given = words(rows, seed) | texts(rows, seed)
    return {name: given[name] for name in ("characters", "tokens", "mask", "index")}


def asked_clips(rows: int, seed: int) -> dict[str, Any]:
    """Clips of four frames, each at a place of its own in a text whose end is the answer."""
    generator = torch.Generator().manual_seed(seed)
    given, at = texts(rows, seed), torch.randint(0, 3, (rows,), generator=generator)
    length = given["mask"].sum(dim=1, keepdim=True)
    return {
        **{name: given[name] for name in ("tokens", "mask", "index")},
        "clip": torch.randn(rows, 1, 4, 8, 8, generator=generator),
        "fps": torch.full((rows,), 25.0),
        "learned": given["mask"] * (torch.arange(6) >= length - 2),
        "clip_at": at,
    }


def agent_steps(numbered: bool) -> Callable[[int, int], dict[str, Any]]:
    """Images before and after an action: one of three, or two numbers in [-1, 1]."""

    def made(rows: int, seed: int) -> dict[str, Any]:
        later, now = views()(rows, seed + 100), images()(rows, seed)
        action = now["label"] if numbered else later["views"][0][:, 0, 0, :2].tanh()
        return now | {"next_image": later["views"][0], "action": action}

    return made


def measured_rows(rows: int, seed: int) -> dict[str, Any]:
    """Rows of a table with a number each."""
    table = torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))
    return {"table": table, "target": table[:, 0] * 2 + 1, "index": torch.arange(rows) + ROWS * seed}


def series(rows: int, seed: int) -> dict[str, Any]:
    """Seven steps of two numbers."""
    sequence = torch.randn(rows, 7, 2, generator=torch.Generator().manual_seed(seed))
    label = (torch.arange(rows) + seed) % 3
    return {"sequence": sequence, "label": label, "index": torch.arange(rows) + ROWS * seed}


def windows(rows: int, seed: int) -> dict[str, Any]:
    return {"tokens": torch.randint(16, (rows, 9), generator=torch.Generator().manual_seed(seed))}


def conversations(rows: int, seed: int) -> dict[str, Any]:
    """Two in each row, of which the ends are learned, and padding."""
    found = texts(rows, seed)
    mask = torch.cat([found["mask"].new_ones(rows, 4), 2 * found["mask"]], dim=1)
    learned = ((torch.arange(10) % 3) == 1) & (mask != 0) & (torch.arange(10) != 4)
    tokens = torch.cat([windows(rows, seed)["tokens"][:, :4], found["tokens"].clamp_max(15)], dim=1)
    return {"tokens": tokens, "mask": mask, "learned": learned.long(), "index": found["index"]}


def gaps(rows: int, seed: int) -> dict[str, Any]:
    """Texts of 4 to 11 tokens with gaps, and what is missing."""
    form = Denoising(14, 14, sentinels=5)
    form.prepare(20)
    generator = np.random.default_rng(seed)
    made = []
    for row in range(rows):
        tokens = generator.integers(20, size=generator.integers(4, 12)).astype(np.int32)
        text = TextTokens(tokens, np.ones_like(tokens))
        made.append(form(text, ROWS * seed + row) | {"index": torch.tensor(ROWS * seed + row)})
    return {name: torch.stack([each[name] for each in made]) for name in made[0]}


def ul2(**optimization: Any) -> UL2:
    return UL2(EncoderDecoder(t5(30, 16, 1, heads=2, mlp_width=24)), **optimization)


def projector(width: int = 6) -> Projector:
    return Projector(8, [10], width, hidden_norm=False)


def patch_vit(**settings: Any) -> nn.Module:
    """16 patches of 2 x 2 pixels."""
    return vit(16, 2, 2, img_size=8, patch_size=2, in_chans=1, **settings)


def elastic(widths: list[int], depths: list[int]) -> ElasticViT:
    return ElasticViT(widths, depths, head_dim=4, img_size=8, patch_size=2, in_chans=1, init_values=0.1)


def dino_head(width: int, prototypes: int) -> DINOHead:
    return DINOHead(width, prototypes, hidden=(12,), bottleneck=6)


MOMENTA: dict[str, Any] = {"momentum": 0.5, "final_momentum": 0.9}
FREE: dict[str, Any] = {"freeze_prototypes": 0.0}


def dino(prototypes: int, **optimization: Any) -> DINO:
    return DINO(Pooled(), dino_head(8, prototypes), temperature_warmup=0.5, **MOMENTA, **FREE, **optimization)


def dinov2(**settings: Any) -> DINOv2:
    # Positions are fixed: timm resamples learned ones in float32, where sums over halves of a batch differ.
    backbone = patch_vit(mask_token=True, any_size=True, registers=1, layer_scale=0.1, swiglu=True)
    masks = BlockMasks(probability=0.8)
    return DINOv2(backbone, dino_head(16, 4), dino_head(16, 5), masks=masks, **MOMENTA, **FREE, **settings)


def large_views(rows: int, seed: int) -> dict[str, Any]:
    """Two views of twice the side that both networks see, and one smaller than that."""
    batch = views(2, smaller=1)(rows, seed)
    doubled = [view.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) for view in batch["views"][:2]]
    return batch | {"views": [*doubled, *batch["views"][2:]]}


def persons(rows: int, seed: int) -> dict[str, Any]:
    """Views of pictures of which each two neighbours show the same person."""
    return views(2, smaller=2)(rows, seed) | {"label": torch.arange(rows) // 2}


def swav(prototypes: int, **optimization: Any) -> SwAV:
    settings = {"queue": 12, "code_temperature": 0.3}
    return SwAV(Pooled(), nn.Linear(8, 6), prototypes, **settings, **FREE, **optimization)


def sliced_volumes(rows: int, seed: int) -> dict[str, Any]:
    """Two crops of each volume, and views of three of its slices."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "views": [torch.randn(rows, 1, 5, 4, 4, generator=generator) for _ in range(2)],
        "slices": [torch.randn(rows, 3, 1, side, side, generator=generator) for side in (8, 8, 4)],
        "label": torch.zeros(rows, dtype=torch.int64),
        "index": torch.arange(rows) + ROWS * seed,
    }


class Staged(Pooled):
    """Tells its one map, as networks of slices do."""

    widths = (8,)

    def maps(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [self.layer(image).tanh()]


def joint_2d_3d(**optimization: Any) -> Joint2D3D:
    transformer = SliceTransformer(8, depth=1, heads=2, mlp_width=12, dropout=0.0)
    backbone = SlicedVolumes(SliceEmbedding(Staged(), 8), transformer)
    intra, inter = (SwappedPrediction(*sizes, code_temperature=0.3, queue=12, **FREE) for sizes in ((6, 7), (8, 4)))
    return Joint2D3D(backbone, nn.Linear(8, 6), intra, inter, RandomMasks(0.4), **optimization)


def cae(codes: int | None, **optimization: Any) -> CAE:
    tokenizer = None if codes is None else PatchCodes(codes, (2, 2), channels=1)
    regressor, decoder = LatentRegressor(16, 1, 2, drop_path=0), LatentDecoder(16, codes or 4, 1, 2, drop_path=0)
    masks = BlockMasks(1.0, (0.5, 0.5))
    return CAE(patch_vit(layer_scale=0.1), regressor, decoder, tokenizer, masks=masks, **optimization)


def mlc(**optimization: Any) -> MLC:
    """Its second stage begins in the middle of the run."""
    built = MLC(Pooled(), nn.Linear(8, 8), nn.Linear(8, 6), first_share=0.5, similarity=0.1, **optimization)
    with torch.no_grad():
        built.cluster_head.weight.add_(1.0)  # apart from the feature head, so that the copy shows
    return built


def depict(**optimization: Any) -> DEPICT:
    """Every image has a target from the first step on."""
    network = ConvAutoencoder((1, 8, 8), (4, 4), (4, 3), embed_dim=3, input_dropout=0.0, dropout=0.0, bounded=False)
    built = DEPICT(network, IMAGES, 3, first_share=0.0, hard_share=0.5, **optimization)
    built.target_MK.copy_(torch.eye(3)[torch.arange(IMAGES) % 3])
    return built


def croco(**optimization: Any) -> CroCo:
    decoder = CrossDecoder(16, width=8, depth=1, block=partial(SelfFirst, heads=2))
    return CroCo(patch_vit(class_token=False), decoder, **optimization)


def cropmae(**optimization: Any) -> CropMAE:
    block = partial(CrossFirst, heads=2, mlp_width=16, dropout=0.0)
    return CropMAE(patch_vit(), CrossDecoder(16, 4, width=8, depth=1, block=block, place_other=False), **optimization)


def mmc(**optimization: Any) -> MMC:
    parts = nn.Linear(16, 8), nn.Linear(8, 8), dino_head(16, 4), nn.Linear(16, 4)
    settings = {"momentum": 0.5, "corruption": GroupCorruption(alien=0.0)}
    return MMC(patch_vit(), *parts, **settings, **FREE, **optimization)


def sit(**optimization: Any) -> SiT:
    corruption = GroupCorruption(RectangleMasks(0.5, longest=0.5), alien=0.0, fill="shifted")
    return SiT(patch_vit(), nn.Linear(16, 8), corruption=corruption, momentum=0.5, **optimization)


def tera(**optimization: Any) -> TERA:
    alterations = SpectrogramAlterations(noise=0.5)
    return TERA(
        FrameTransformer(6, width=8, depth=1, heads=2, dropout=0.0), LogMel(1_000, 6), alterations, **optimization
    )


def heuristic_mtl(**optimization: Any) -> HeuristicMTL:
    parts = patch_vit(mask_token=True), nn.Linear(16, 3), nn.Linear(16, 8)
    return HeuristicMTL(*parts, negative_focus=1.0, momentum=0.5, **optimization)


def m3i(mix: PatchMix, **optimization: Any) -> M3I:
    encoders = DualEncoder(patch_vit(class_token=False), TextTransformer(20, 8, 1, 2, 6), width=5)
    decoder = MaskDecoder(16, width=8, depth=1, heads=2)
    return M3I(encoders, decoder, nn.Linear(16, 3), MomentumFeatures(0.5, 0.9), mix, **optimization)


class Strided(nn.Module):
    """Two maps, at strides 2 and 4."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        fine, coarse = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.layers = nn.Sequential(fine, nn.GELU(), coarse, nn.GELU())

    @property
    def feature_modules(self) -> list[nn.Module]:
        return [self.layers[1], self.layers[3]]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image).mean(dim=(2, 3))


def without_norms(network: nn.Module) -> Any:
    for name, layer in [*network.named_modules()]:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            network.set_submodule(name, nn.Identity())
    return network


def spark(**optimization: Any) -> SparK:
    decoder = without_norms(UNetDecoder([8, 4], in_chans=1, width=8, cell=4))
    return SparK(Strided(), decoder, RandomMasks(0.5), **optimization)


def bands(*dates: int, side: int = 16) -> Callable[[int, int], dict[str, Any]]:
    """Three bands, of which more is valid in one half of the rows than in the other, and in one row nothing."""

    def made(rows: int, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        image, seen = (torch.rand(rows, 3, *dates, side, side, generator=generator) for _ in range(2))
        share = torch.linspace(0, 1, max(rows, 1))[:rows].view(-1, *[1] * (image.ndim - 1))
        valid = seen < share
        return {
            "image": torch.where(valid, 3 * image - 1.5, 0),
            "valid": valid.long(),
            "label": torch.zeros(rows, dtype=torch.int64),
            "index": torch.arange(rows) + ROWS * seed,
        }

    return made


def satmaepp(upsampler: bool, **optimization: Any) -> SatMAEpp:
    backbone = GroupedViT([[0, 2], [1]], 16, 2, 2, patch_size=2, group_width=4)
    decoder = GroupedMaskDecoder(16, width=8, depth=1, heads=2, group_width=4)
    return SatMAEpp(backbone, decoder, UpsamplerPyramid(3, 1, 4) if upsampler else None, steps=1, **optimization)


def modalities(rows: int, seed: int) -> dict[str, Any]:
    """Volumes of three modalities, of which each row lacks some and one row in eight all."""
    generator = torch.Generator().manual_seed(seed)
    volume = torch.randn(rows, 3, 4, 4, 4, generator=generator)
    present = (torch.arange(rows)[:, None] + 1) >> torch.arange(3) & 1 > 0
    return {
        "volume": volume * present[:, :, None, None, None],
        "present": present,
        "label": torch.zeros(rows, dtype=torch.int64),
        "index": torch.arange(rows) + ROWS * seed,
    }


def bm_mae(**optimization: Any) -> BMMAE:
    decoder = ModalityDecoder(12, width=12, depth=1, heads=2, dropout=0.0)
    return BMMAE(ModalityViT((2, 2, 2), 3, 12, 2, 2), decoder, **optimization)


def radiance(rows: int, seed: int) -> dict[str, Any]:
    """Grids of colour and opacity, of which each row is padded and one in eight empty."""
    generator = torch.Generator().manual_seed(seed)
    volume = torch.rand(rows, 4, 4, 8, 8, generator=generator)
    inside = (torch.arange(8) < 8 - torch.arange(rows)[:, None] % 4)[:, None, None].expand(-1, 4, 8, -1)
    empty = (torch.arange(rows) % 8 == 7)[:, None, None, None]
    volume[:, 3] = volume[:, 3].masked_fill(~inside | empty, 0)
    return {
        "volume": volume,
        "spacing": torch.ones(rows, 3),
        "inside": inside.clone(),
        "label": torch.zeros(rows, dtype=torch.int64),
        "index": torch.arange(rows) + ROWS * seed,
    }


def clouds(rows: int, seed: int) -> dict[str, Any]:
    """Clouds of 0 to 12 points."""
    generator = torch.Generator().manual_seed(seed)
    counts = (5 * torch.arange(1, rows + 1) % 13).tolist()
    return {
        "xyz": torch.randn(sum(counts), 3, generator=generator),
        "offsets": torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int64),
        "label": torch.zeros(rows, dtype=torch.int64),
        "index": torch.arange(rows) + ROWS * seed,
    }


def graphs(rows: int, seed: int) -> dict[str, Any]:
    """Rings and pairs of 0 to 4 nodes."""
    generator = torch.Generator().manual_seed(seed)
    counts = (3 * torch.arange(1, rows + 1) % 5).tolist()
    firsts = np.cumsum([0, *counts])
    edges = [
        (first + a, first + (a + 1) % n) for first, n in zip(firsts, counts, strict=False) for a in range(n * (n > 1))
    ]
    kind = torch.randint(4, (int(firsts[-1]),), generator=generator)
    return {
        "node": torch.nn.functional.one_hot(kind, 4).float(),
        "edge_index": torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).T.contiguous(),
        "edge": torch.randn(len(edges), 2, generator=generator),
        "offsets": torch.tensor(firsts.tolist(), dtype=torch.int64),
        "kind": kind,
        "label": torch.zeros(rows, dtype=torch.int64),
        "index": torch.arange(rows) + ROWS * seed,
    }


def attribute_masking(**optimization: Any) -> AttributeMasking:
    return AttributeMasking(without_norms(GIN(4, 2, width=8, depth=2)), num_kinds=4, **optimization)


def nerf_mae(**optimization: Any) -> NeRFMAE:
    backbone = GridSwin((2, 2, 2), (2, 2, 2), 4, 12, (2, 1), (2, 2), positions=True)
    return NeRFMAE(
        backbone, UNETRDecoder([12, 24], 4, (2, 2, 2)), CoarseMasks((1, 2, 2), RandomMasks(0.5)), **optimization
    )


def point_mae(**optimization: Any) -> PointMAE:
    backbone = without_norms(
        PointViT(groups=5, size=4, width=12, depth=2, heads=2, drop_path=0, point_widths=(4, 4, 8))
    )
    return PointMAE(backbone, PointDecoder(12, depth=1, heads=2, drop_path=0), **optimization)


def labelled_clouds(rows: int, seed: int) -> dict[str, Any]:
    """Clouds of 0 to 12 points with colours and classes, of which some are not known."""
    batch, generator = clouds(rows, seed), torch.Generator().manual_seed(seed + 50)
    points = len(batch["xyz"])
    colour = torch.rand(points, 3, generator=generator)
    return {**batch, "colour": colour, "classes": torch.randint(-1, 3, (points,), generator=generator)}


def sweeps(rows: int, seed: int) -> dict[str, Any]:
    """Clouds of 0 to 12 points that move at random, of which the next sweep sees some, and has others."""
    batch, generator = clouds(rows, seed), torch.Generator().manual_seed(seed + 70)
    points, counts = len(batch["xyz"]), 3 * torch.arange(1, rows + 1) % 7
    return {
        **batch,
        "flow": 0.3 * torch.randn(points, 3, generator=generator),
        "again": torch.rand(points, generator=generator) < 0.7,
        "next_xyz": torch.randn(int(counts.sum()), 3, generator=generator),
        "next_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
    }


def e_ssl3d(**optimization: Any) -> ESSL3D:
    backbone = without_norms(Pillars(3.0, 0.75, 6, [4, 6], [1, 0], [1, 2], 4))
    heads = [without_norms(Projector(*sizes)) for sizes in ((8, [8], 6), (6, [8], 6), (16, [8], 4))]
    return ESSL3D(backbone, *heads, points=5, **optimization)


def point_segmenter(**optimization: Any) -> PointSegmenter:
    encoder = Swin3DEncoder(
        widths=(4, 6), depths=(2, 1), heads=(2, 2), windows=(2, 2), strides=(2,), neighbours=3, drop_path=0.0
    )
    backbone = VoxelPoints(without_norms(Swin3D(encoder)), size=0.5)
    return PointSegmenter(backbone, 3, **optimization)


def posed_scenes(rows: int, seed: int) -> dict[str, Any]:
    """Clouds of 0 to 12 points with colours, and two views of each from outside, of which some pixels have no depth."""
    batch, generator = clouds(rows, seed), torch.Generator().manual_seed(seed + 60)
    side = torch.tensor([[0.0, 1, 0], [0, 0, -1], [-1, 0, 0]])  # looks to where x is small
    lens = torch.tensor([[4.0, 0, 1.5], [0, 4, 1], [0, 0, 1]])
    return {
        **batch,
        "colour": torch.rand(len(batch["xyz"]), 3, generator=generator),
        "pictures": torch.rand(rows, 2, 3, 3, 4, generator=generator),
        "depth": (8 * torch.rand(rows, 2, 3, 4, generator=generator) - 1).relu(),
        "place": torch.tensor([4.0, 0, 0]) + 0.2 * torch.randn(rows, 2, 3, generator=generator),
        "rotation": side.repeat(rows, 2, 1, 1),
        "intrinsics": lens.repeat(rows, 2, 1, 1),
    }


def ponder_v2(**optimization: Any) -> PonderV2:
    network = without_norms(SparseUNet(6, 4, (4, 6), (1, 1)))
    field = SignedField(3, 3, hidden=4)
    small: dict[str, Any] = {"grid": (2, 3, 4), "keep": 0.6, "rays": 5, "pieces": 5, "finer": 3, "truncation": 0.2}
    return PonderV2(VoxelPoints(network, size=0.5), GridUNet(6, 6, (4, 4)), field, **small, **optimization)


def drawn_scenes(rows: int, seed: int) -> dict[str, Any]:
    """As `posed_scenes`, with pictures of 4 x 4 pixels."""
    batch, generator = posed_scenes(rows, seed), torch.Generator().manual_seed(seed + 70)
    pictures = torch.rand(rows, 2, 3, 4, 4, generator=generator)
    return {**batch, "pictures": pictures, "depth": 1 + pictures[:, :, 0]}


def gaussian2scene(**optimization: Any) -> Gaussian2Scene:
    backbone = without_norms(
        PointViT(groups=5, size=4, width=12, depth=1, heads=2, drop_path=0, point_widths=(4, 4, 8))
    )
    pictures = vit(12, 1, 2, img_size=4, patch_size=2, class_token=False)
    decoders = PointDecoder(12, depth=1, heads=2, drop_path=0), MaskDecoder(12, width=8, depth=1, heads=2)
    settings: dict[str, Any] = {"draw_from": 0.0} | optimization
    return Gaussian2Scene(backbone, pictures, JointEncoder(12, 1, 2), *decoders, **settings)


def p2p(**optimization: Any) -> P2P:
    prompt = without_norms(PointPrompt(EdgeEncoder(4, 3, neighbours=3, groups=2), side=6))
    return P2P(MLP((3, 6, 6), (8,)), 3, prompt, votes=(2, 1), **optimization)


def i2p_mae(**optimization: Any) -> I2PMAE:
    torch.manual_seed(0)
    sizes = {"groups": (8, 5), "sizes": (4, 3), "widths": (8, 12), "depths": (1, 1), "point_widths": (4, 4, 8)}
    backbone = without_norms(PointPyramid(**sizes, heads=2, drop_path=0))
    decoder = without_norms(PyramidDecoder((12, 8), (1, 1), heads=2, drop_path=0))
    picture = {"img_size": 16, "patch_size": 8, "embed_dim": 4, "depth": 1, "num_heads": 2, "num_classes": 0}
    guide = ImageGuide(timm_network("vit_tiny_patch16_224", **picture), side=16)
    return I2PMAE(backbone, decoder, guide, GuidedMasks(0.6), spread=3, **optimization)


def prithvi(**optimization: Any) -> Prithvi:
    decoder = MaskDecoder(16, width=16, depth=1, heads=2, axis_widths=series_widths(16))
    return Prithvi(SeriesViT(3, 16, 2, 2, patch_size=4), decoder, **optimization)


def selfie(**optimization: Any) -> Selfie:
    summary = SummaryTransformer(8, depth=1, heads=2, mlp_width=12, dropout=0.0)
    return Selfie(Pooled(), summary, grid=(2, 2), masks=RandomMasks(0.5), **optimization)


def fst(**settings: Any) -> FST:
    """Whose answers count from one half."""
    return FST(UNet(1, width=4, levels=2), 3, virtual_steps=2, momentum=0.9, confidence=0.4, **settings)


def volume_fusion(**optimization: Any) -> VolumeFusion:
    return VolumeFusion(UNet(1, width=4, levels=2), CoefficientMaps(edges=(2, 4)), supervised_scales=2, **optimization)


def poa(**optimization: Any) -> POA:
    heads = [dino_head(16, prototypes) for prototypes in (4, 9)]
    settings = {"masks": BlockMasks(probability=0.8), "patch_loss_from": 0.0}
    return POA(elastic([8, 16], [1, 2]), heads, **settings, **MOMENTA, **FREE, **optimization)


def hydra(**optimization: Any) -> Hydra:
    gate = ClassPairGate(8, 6, label_features=5, hidden=7)
    return Hydra(Pooled(), projector(), without_norms(gate), Arbitrary(1), **optimization)


def sie(**optimization: Any) -> SIE:
    halves = [Projector(4, [6], width, hidden_norm=False) for width in (5, 3)]
    return SIE(Pooled(), *halves, HyperLinear(2, 3, 3), PlaneTurn(column=0), **optimization)


def pre(**optimization: Any) -> PRE:
    encoders = DualEncoder(Pooled(), TextTransformer(64, 8, 1, 2, 12), width=6)
    built = PRE(encoders, TokenLSTM(8), base_classes=[1, 3], **optimization)
    built.tokenizer, built.class_names = HashedWords(64), ["red ring", "blue bar", "large white cross", "disc"]
    built.name_classes(built.tokenizer, built.class_names)
    return built


def named_classes(**optimization: Any) -> NamedClasses:
    built = NamedClasses(DualEncoder(Pooled(), TextTransformer(64, 8, 1, 2, 12), width=6), "a {}", **optimization)
    built.tokenizer, built.class_names = HashedWords(64), ["red ring", "blue bar", "large white cross", "disc"]
    built.name_classes(built.class_names, built.tokenizer)
    return built


def dptr(**optimization: Any) -> DPTR:
    encoders, noise = DualEncoder(Pooled(), TextTransformer(20, 8, 1, 2, 6), width=8), BankNoise(torch.randn(5, 8, 8))
    return DPTR(encoders, LetterDecoder(5, 4, 8, depth=2, heads=2, dropout=0.0), noise, **optimization)


def pllava(**optimization: Any) -> PLLaVA:
    words = llama(20, 12, 1, 2, 16, 24)
    return PLLaVA(ImageLanguage(patch_vit(), MLPHead(16, hidden=[8]), words, -1), (2, 2, 1), **optimization)


def word_reader(**optimization: Any) -> WordReader:
    decoder = LetterDecoder(5, 4, 16, depth=1, heads=2, dropout=0.0)
    return WordReader(patch_vit(class_token=False), decoder, FeatureMerge(16, 5, heads=2, dropout=0.0), **optimization)


def framed(optimizer: Any) -> Classifier:
    head, rule = GrassmannHead(8, 4, rank=2), partial(RiemannianSGD, lr=0.5, rest=optimizer)
    return Classifier(Pooled(), 4, head=head, optimizer=rule)


def bert(**optimization: Any) -> TextClassifier:
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return TextClassifier(BertModel(config, add_pooling_layer=False), 3, **optimization)


def small_bert() -> Any:
    return language.bert(21, 16, 2, 2, 24, 6, dropout=0.0)


def starbucks(loss: PairLoss, **optimization: Any) -> Starbucks:
    return Starbucks(small_bert(), FixedSizes([(1, 4), (2, 16)]), loss, **optimization)


def smae(**optimization: Any) -> SMAE:
    sizes, masks = FixedSizes([(1, 4), (2, 16)]), NestedWordMasks(0.3, 0.6)
    return SMAE(small_bert(), sizes, mask_token=20, masks=masks, **optimization)


def prompted(alignment: Discrepancy | None, **optimization: Any) -> PromptedClassifier:
    network = EncoderDecoder(language.t5(20, 16, 1, heads=2, mlp_width=24))
    return PromptedClassifier(network, 2, alignment, **optimization)


def pela(**optimization: Any) -> PELA:
    sides = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 0}
    network = VisionTransformer(embed_dim=16, depth=1, num_heads=2, **sides)
    return PELA(network, nn.Linear(16, 3), ratio=2.0, beta=0.5, **optimization)


def dit(**optimization: Any) -> DenoisingDiffusion:
    backbone = DiT(8, patch_size=4, in_chans=1, width=8, depth=1, heads=2, num_classes=3)
    return DenoisingDiffusion(backbone, levels=10, **optimization)


def hda(**optimization: Any) -> HDA:
    return HDA(ConvGenerator(3, image_size=8, widths=(4, 3)), [Pooled()], 3, **optimization)


def vae(**optimization: Any) -> VAE:
    return VAE(Pooled(), ConvGenerator(3, image_size=8, widths=(4, 3)), noise=1.0, **optimization)


def lcvd(**optimization: Any) -> LCVD:
    backbone = VideoUNet(4, 2, widths=(4, 6))
    nn.init.normal_(backbone.last.weight, std=0.2)
    hints = [HintEncoder(4, widths=(3, 4), halvings=1) for _ in range(2)]
    return LCVD(backbone, *hints, **optimization)


def lit_clips(rows: int, seed: int) -> dict[str, Any]:
    """Clips of three frames of two channels, with hints of twice the sides."""
    generator = torch.Generator().manual_seed(seed)
    clip, reference = (torch.randn(rows, 2, *sides, generator=generator) for sides in ((3, 4, 5), (4, 5)))
    portrait, shading = (torch.rand(rows, 3, *sides, generator=generator) for sides in ((8, 10), (3, 8, 10)))
    return {
        "clip": clip,
        "fps": torch.full((rows,), 25.0),
        "face": (clip[:, 0] > 0).long(),
        "reference": reference,
        "reference_face": (reference[:, 0] > 0).long(),
        "portrait": portrait,
        "shading": shading,
        "label": torch.arange(rows) % 3,
        "index": torch.arange(rows) + rows * seed,
    }


def ssvi(**optimization: Any) -> SSVI:
    return SSVI(MLP((1, 8, 8), (12,)), 3, density=0.3, train_samples=100, **optimization)


def merging(kind: Callable[..., Method], **optimization: Any) -> Method:
    heads = {task: nn.Linear(12, 10) for task in TASKS}
    return kind(MLP((1, 8, 8), (12,)), GaussianModels([*TASKS]), heads, **optimization)


def of_tasks(rows: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, len(TASKS), 1, 8, 8, generator=generator)
    label = torch.randint(10, (rows, len(TASKS)), generator=generator)
    return {"image": image, "label": label, "index": torch.arange(rows) + ROWS * seed}


TASKS = ("up", "left", "down")
WHOLE = "which a sharded one cannot be"
NO_TEXT = "needs a text on every rank, and this batch has none"

CASES: dict[str, Case] = {
    "bayesian.ssvi": Case(ssvi, images(), unsharded="which FSDP2 splits", refuses_low_rank="got no matrix to project"),
    "clustering.deepcluster": Case(
        lambda **o: DeepCluster(Pooled(), nn.Linear(8, 6), IMAGES, (3, 4, 5), **o),
        views(2, smaller=2),
        forward_state=("memory_GMD",),
    ),
    "clustering.depict": Case(depict, images()),
    "clustering.joint_2d_3d": Case(joint_2d_3d, sliced_volumes, halves_differ=AMONG_ROWS),
    "clustering.mlc": Case(mlc, views(), halves_differ=AMONG_ROWS),
    "clustering.swav": Case(partial(swav, 7), views(2, smaller=2), halves_differ=AMONG_ROWS),
    "clustering.swav, wide": Case(partial(swav, 4), views(2, smaller=2), halves_differ=AMONG_ROWS),
    "compression.pela": Case(pela, images()),
    "contrastive.hydra": Case(hydra, views(), halves_differ=AMONG_ROWS),
    "contrastive.lejepa": Case(
        lambda **o: LeJEPA(Pooled(), projector(), directions=20, **o), views(2, smaller=2), halves_differ=AMONG_ROWS
    ),
    "contrastive.mixed_barlow_twins": Case(
        lambda **o: MixedBarlowTwins(Pooled(), projector(), **o),
        views(),
        halves_differ=AMONG_ROWS,
        ranks_differ=PER_RANK,
    ),
    "contrastive.mixed_barlow_twins, plain": Case(
        lambda **o: MixedBarlowTwins(Pooled(), projector(), lam_reg=0.0, **o),
        views(),
        halves_differ=AMONG_ROWS,
    ),
    "contrastive.moco": Case(lambda **o: MoCo(Pooled(), projector(), queue=12, momentum=0.9, **o), views()),
    "contrastive.moco_v3": Case(
        lambda **o: MoCoV3(Pooled(), projector(), Projector(6, [10], 6, hidden_norm=False), **o),
        views(),
        halves_differ=AMONG_ROWS,
    ),
    "contrastive.rspnet": Case(
        lambda **o: RSPNet(Pooled(), nn.Linear(8, 6), nn.Linear(8, 6), queue=12, momentum=0.9, **o),
        views(4),
        halves_differ="half of the rows of a micro-batch play fast",
    ),
    "contrastive.scatsimclr": Case(
        lambda **o: ScatSimCLR(Pooled(), projector(), QuarterTurn(8, hidden=(6, 5), dropout=0.0), **o),
        views(6),
        halves_differ=AMONG_ROWS,
    ),
    "contrastive.sie": Case(sie, placed_views, halves_differ=AMONG_ROWS),
    "contrastive.selfie": Case(selfie, views(1)),
    "contrastive.simclr": Case(lambda **o: SimCLR(Pooled(), projector(), **o), views(), halves_differ=AMONG_ROWS),
    "contrastive.softcon": Case(
        lambda **o: SoftCon(Pooled(), projector(), patch=(2, 2), momentum=0.5, **o),
        tagged_views,
        halves_differ=AMONG_ROWS,
    ),
    "contrastive.spectral": Case(
        lambda **o: SpectralContrastive(Pooled(), projector(), **o), views(), halves_differ=AMONG_ROWS
    ),
    "contrastive.spectral, fixed head": Case(
        lambda **o: SpectralContrastive(Pooled(), ReweightingHead(8, kappa=1.2), length=2.0, **o),
        views(),
        halves_differ=AMONG_ROWS,
    ),
    "contrastive.starbucks": Case(
        partial(starbucks, SentenceRanking()), text_pairs, halves_differ=AMONG_ROWS, refuses_no_row=NO_TEXT
    ),
    "contrastive.starbucks, retrieval": Case(
        partial(starbucks, Retrieval()), text_pairs, halves_differ=AMONG_ROWS, refuses_no_row=NO_TEXT
    ),
    "contrastive.starbucks, scores": Case(
        partial(starbucks, CoSENT()), text_pairs, halves_differ=AMONG_ROWS, refuses_no_row=NO_TEXT
    ),
    "contrastive.supcon": Case(lambda **o: SupCon(Pooled(), projector(), **o), views(), halves_differ=AMONG_ROWS),
    "contrastive.supremix": Case(
        lambda **o: SupReMix(Pooled(), projector(), **o), views(classes=5), halves_differ=AMONG_ROWS
    ),
    "contrastive.vicreg": Case(
        lambda **o: VICReg(Pooled(), projector(), **o),
        views(),
        halves_differ=AMONG_ROWS,
    ),
    "contrastive.voco": Case(lambda **o: VoCo(Pooled(), projector(), **o), base_crops),
    "contrastive.voco, with a teacher": Case(lambda **o: VoCo(Pooled(), projector(), momentum=0.5, **o), base_crops),
    "contrastive.voco_large": Case(
        lambda **o: VoCoLarge(Pooled(), projector(), momentum=0.5, **o), base_crops, halves_differ=AMONG_ROWS
    ),
    "distillation.byol": Case(lambda **o: BYOL(Pooled(), nn.Linear(8, 8), nn.Linear(8, 8), momentum=0.5, **o), views()),
    "distillation.cion": Case(lambda **o: CION(Pooled(), dino_head(8, 9), **MOMENTA, **FREE, **o), persons),
    "distillation.dino": Case(partial(dino, 9), views(2, smaller=2)),
    "distillation.dino, wide": Case(partial(dino, 4), views(2, smaller=2)),
    "distillation.dinov2": Case(dinov2, views(2, smaller=1), halves_differ=AMONG_ROWS),
    "distillation.dinov2, anchored": Case(
        lambda **o: dinov2(anchor=GramAnchor(taken=0.2, start=0.4, renewed=0.2), koleo_group=2, **o),
        large_views,
        halves_differ=AMONG_ROWS,
    ),
    "distillation.fst": Case(fst, domains, halves_differ=LOOKS_AHEAD, unsharded="with whole weights"),
    "distillation.fst, wide": Case(
        partial(fst, form="wide"), domains, halves_differ=LOOKS_AHEAD, unsharded="with whole weights"
    ),
    "distillation.ibot": Case(
        lambda **o: IBOT(
            elastic([16], [1]), [dino_head(16, 4)], masks=BlockMasks(probability=0.8), **MOMENTA, **FREE, **o
        ),
        views(2, smaller=1),
    ),
    "distillation.mmc": Case(mmc, views(), halves_differ=AMONG_ROWS),
    "distillation.poa": Case(poa, views(2, smaller=1), halves_differ=AMONG_ROWS),
    "distillation.sd_fpt": Case(
        lambda **o: SDFPT(patch_vit(), MaskDecoder(16, 4, width=8, depth=1, heads=2), patch_vit(), **o), views(1)
    ),
    "distillation.simsiam": Case(lambda **o: SimSiam(Pooled(), nn.Linear(8, 8), nn.Linear(8, 8), **o), views()),
    "distillation.unip": Case(
        lambda **o: UNIP(patch_vit(last_heads=4), vit(24, 2, 4, img_size=8, patch_size=2, in_chans=1), 0, **o),
        views(1),
    ),
    "generative.denoising_diffusion": Case(dit, images(), halves_differ=PER_RANK, ranks_differ=PER_RANK),
    "generative.lcvd": Case(lcvd, lit_clips, halves_differ=PER_RANK, ranks_differ=PER_RANK),
    "generative.hda": Case(hda, images(), halves_differ=AMONG_ROWS, ranks_differ=PER_RANK),
    "image_text.clip": Case(
        lambda **o: CLIP(DualEncoder(Pooled(), TextTransformer(20, 8, 1, 2, 6), width=5), **o),
        pairs,
        halves_differ=AMONG_ROWS,
    ),
    "image_text.m3i": Case(partial(m3i, PatchMix()), partly_labelled, halves_differ=AMONG_ROWS, ranks_differ=MIXED),
    "image_text.m3i, one source": Case(
        partial(m3i, PatchMix(1, hidden=0.5)), partly_labelled, halves_differ=AMONG_ROWS
    ),
    "image_text.named_classes": Case(named_classes, images(labels=(1, 3)), halves_differ=AMONG_ROWS),
    "image_text.pllava": Case(pllava, asked_clips, halves_differ=AMONG_ANSWERS, refuses_no_row=NO_TEXT),
    "image_text.pre": Case(pre, images(labels=(1, 3))),
    "image_text.dptr": Case(dptr, spelled_words, halves_differ=AMONG_LETTERS),
    "language.causal_lm": Case(lambda **o: CausalLM(llama(16, 16, 1, 2, 24, 12), **o), windows, refuses_no_row=NO_TEXT),
    "language.causal_lm, conversations": Case(
        lambda **o: CausalLM(llama(16, 16, 1, 2, 24, 12), **o),
        conversations,
        halves_differ=AMONG_ANSWERS,
        refuses_no_row=NO_TEXT,
    ),
    "language.prompted_classifier": Case(partial(prompted, None), prompts, refuses_no_row=NO_TEXT),
    "language.prompted_classifier, aligned": Case(
        partial(prompted, Discrepancy()), prompts, halves_differ=AMONG_ROWS, refuses_no_row=NO_TEXT
    ),
    "language.text_classifier": Case(bert, texts, refuses_no_row=NO_TEXT),
    "masked.ul2": Case(ul2, gaps, halves_differ=AMONG_TARGETS, refuses_no_row="needs a text on every rank"),
    "masked.ul2, decoder alone": Case(
        lambda **o: UL2(PrefixDecoder(llama(30, 16, 1, 2, 24, 40)), **o),
        gaps,
        halves_differ=AMONG_TARGETS,
        refuses_no_row="needs a text on every rank",
    ),
    "masked.bm_mae": Case(bm_mae, modalities, halves_differ=AMONG_MODALITIES),
    "masked.cae": Case(partial(cae, 5), views(1), halves_differ="the first micro-batch alone gives the codes"),
    "masked.cae, pixels": Case(partial(cae, None), views(1)),
    "masked.croco": Case(croco, views(2)),
    "masked.cropmae": Case(cropmae, views(2)),
    "masked.i_jepa": Case(
        lambda **o: IJEPA(
            patch_vit(), MaskDecoder(16, 16, width=8, depth=1, heads=2), MultiBlock(targets=2), momentum=0.5, **o
        ),
        views(1),
    ),
    "masked.nerf_mae": Case(nerf_mae, radiance, halves_differ=AMONG_VOXELS),
    "masked.prithvi": Case(prithvi, bands(3, side=8)),
    "masked.satmaepp": Case(partial(satmaepp, True), bands()),
    "masked.satmaepp, one scale": Case(partial(satmaepp, False), bands()),
    "masked.sit": Case(sit, views(), halves_differ=AMONG_ROWS),
    "masked.smae": Case(smae, words_of_texts, halves_differ=AMONG_TOKENS, refuses_no_row=NO_TEXT),
    "masked.spark": Case(spark, views(1)),
    "masked.spt": Case(
        lambda **o: SPT(sequence_transformer(2, width=8, depth=1, heads=2), **o), series, halves_differ=AMONG_STEPS
    ),
    "masked.spt, symbols": Case(
        lambda **o: SPT(sequence_state_space(None, 20, width=8, depth=1, states=3), **o),
        texts,
        halves_differ=AMONG_STEPS,
    ),
    "masked.spt, next value": Case(
        lambda **o: SPT(
            sequence_state_space(2, width=8, depth=1, states=3, causal=True), NextValue(), LevelGuess(8), **o
        ),
        series,
    ),
    "masked.models_genesis": Case(lambda **o: ModelsGenesis(UNet(1, width=4, levels=2), **o), views(1)),
    "masked.tera": Case(tera, sounds, halves_differ=AMONG_CELLS),
    "masked.v_jepa": Case(
        lambda **o: VJEPA(  # whose rows of patches are its frames
            GridViT((2, 2), 1, 16, 1, 2),
            MaskDecoder(16, 16, width=8, depth=1, heads=2),
            [TubeBlocks(2, 0.3, hidden=0.5), TubeBlocks(1, 0.7, hidden=0.75, seed=1)],
            momentum=0.5,
            **o,
        ),
        views(1),
    ),
    "merging.adamerging": Case(partial(merging, AdaMerging), of_tasks, unsharded=WHOLE),
    "merging.atlas": Case(partial(merging, Atlas), of_tasks, unsharded=WHOLE),
    "merging.concrete_adamerging": Case(
        partial(merging, ConcreteAdaMerging, inner=partial(torch.optim.SGD, lr=0.1)),
        of_tasks,
        halves_differ="every other row of a batch makes the inner step",
        unsharded=WHOLE,
        refuses_one_row="needs two samples a batch",
        refuses_no_row="needs two samples a batch",
    ),
    "merging.concrete_arithmetic": Case(partial(merging, ConcreteArithmetic), of_tasks, unsharded=WHOLE),
    "masked.mae": Case(lambda **o: MAE(patch_vit(), MaskDecoder(16, 4, width=8, depth=1, heads=2), **o), views(1)),
    "robustness.nmtune": Case(
        lambda **o: NMTune(Pooled(), ResidualMLP(8, batch_norm=False), 3, **o), views(), halves_differ=AMONG_ROWS
    ),
    "supervised.look": Case(
        lambda **o: LOOK(Pooled(), projector(), queue=12, neighbours=5, momentum=0.9, **o), views()
    ),
    "supervised.adsl": Case(
        lambda **o: ADSL(Pooled(), SubspaceLearners(8, 6), IMAGES, 3, **o),
        images(),
        halves_differ=AMONG_ROWS,
        unsharded="which FSDP2 splits",
    ),
    "supervised.behaviour_cloning": Case(
        lambda **o: BehaviourCloning(Pooled(), ContinuousActions(8, 2, [6], dropout=0.0), **o), agent_steps(False)
    ),
    "supervised.heuristic_mtl": Case(heuristic_mtl, tagged_views, halves_differ=AMONG_ROWS),
    "supervised.inverse_dynamics": Case(
        lambda **o: InverseDynamics(Pooled(), ContinuousActions(16, 2, [6], dropout=0.0), **o), agent_steps(False)
    ),
    "supervised.inverse_dynamics, numbered": Case(
        lambda **o: InverseDynamics(Pooled(), DiscreteActions(16, 3, [6], dropout=0.0), **o), agent_steps(True)
    ),
    "supervised.p2p": Case(p2p, clouds),
    "supervised.regressor": Case(lambda **o: Regressor(MLP((1, 1, 12), (8,)), 1.0, 2.0, **o), measured_rows),
    "supervised.selavpr": Case(
        lambda **o: SelaVPR(patch_vit(), UpConvolutions(16, [6, 4]), **o), place_pairs, halves_differ=AMONG_ROWS
    ),
    "supervised.segmenter": Case(
        lambda **o: Segmenter(ScannedUNet((2, 2), 1, 8, (1, 1), None, states=2, drop_path=0), 3, **o), domains
    ),
    "supervised.sequence_classifier": Case(
        lambda **o: SequenceClassifier(sequence_transformer(2, width=8, depth=1, heads=2), 3, **o), series
    ),
    "supervised.slca": Case(lambda **o: SLCA(Pooled(), 3, **o), images(), unsharded="which FSDP2 splits"),
    "masked.attribute_masking": Case(
        attribute_masking, graphs, halves_differ="a mean over hidden nodes, of which halves have other numbers"
    ),
    "masked.i2p_mae": Case(
        i2p_mae, clouds, halves_differ="clouds have different numbers of groups that are seen and hidden"
    ),
    "contrastive.e_ssl3d": Case(e_ssl3d, sweeps, halves_differ=AMONG_ROWS),
    "masked.point_mae": Case(point_mae, clouds),
    "masked.gaussian2scene": Case(gaussian2scene, drawn_scenes),
    "generative.vae": Case(vae, images(), halves_differ=PER_RANK, ranks_differ=PER_RANK),
    "generative.ponder_v2": Case(ponder_v2, posed_scenes, halves_differ=AMONG_RAYS, unsharded="which FSDP2 splits"),
    "supervised.point_segmenter": Case(point_segmenter, labelled_clouds, halves_differ=AMONG_POINTS),
    "supervised.volume_fusion": Case(volume_fusion, views()),
    "supervised.word_reader": Case(word_reader, words, halves_differ=AMONG_LETTERS),
    "supervised.tag_classifier": Case(lambda **o: TagClassifier(Pooled(), nn.Linear(8, 3), **o), tagged),
    "supervised.classifier": Case(lambda **o: Classifier(Pooled(), 3, **o), images()),
    "supervised.classifier, frames": Case(framed, images(), refuses_low_rank="RiemannianSGD cannot keep the state of"),
}
"""By method, with variants behind a comma. A batch that is the same for two ranks, in halves or resumed is the rule;
what a case says about itself is the exception, which the suites hold it to."""
