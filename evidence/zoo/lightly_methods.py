"""Five of the methods from lightly's losses, heads and helpers, put together as in its documentation's examples.

Each is a module with an `encoder`, which is given, and `loss(views, step)`; what a loss returns is stepped by a plain
loop. Widths are those of `methods`. Every view passes through the encoder by itself, as in the examples.
Shapes: V views of B pictures [B C h w].
"""

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from evidence.zoo.methods import DECODER, FROZEN, HEADS, HIDDEN, OUT, PROTOTYPES, TEACHER, WIDTH, Task
from lightspan.optim.schedules import cosine_between, line_between

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightly.loss import BarlowTwinsLoss, DINOLoss, NTXentLoss, SwaVLoss
    from lightly.models import utils
    from lightly.models.modules import heads
    from lightly.models.modules.masked_autoencoder_timm import MAEDecoderTIMM
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM


class Peer(nn.Module):
    """An encoder that lightly's parts train for a number of steps."""

    def __init__(self, task: Task, steps: int) -> None:
        super().__init__()
        self.encoder, self.steps = task.encoder(), steps

    @abstractmethod
    def loss(self, views: list[Tensor], step: int) -> Tensor: ...


class BarlowTwins(Peer):
    def __init__(self, task: Task, steps: int) -> None:
        super().__init__(task, steps)
        self.head = heads.BarlowTwinsProjectionHead(self.encoder.num_features, HIDDEN, OUT)
        self.criterion: Any = BarlowTwinsLoss(lambda_param=1 / OUT)

    def loss(self, views: list[Tensor], step: int) -> Tensor:
        return self.criterion(*(self.head(self.encoder(view)) for view in views))


class SimCLR(Peer):
    def __init__(self, task: Task, steps: int) -> None:
        super().__init__(task, steps)
        self.head = heads.SimCLRProjectionHead(self.encoder.num_features, HIDDEN, OUT)
        self.criterion = NTXentLoss(temperature=0.5)

    def loss(self, views: list[Tensor], step: int) -> Tensor:
        return self.criterion(*(self.head(self.encoder(view)) for view in views))


class SwAV(Peer):
    def __init__(self, task: Task, steps: int) -> None:
        super().__init__(task, steps)
        self.head = heads.SwaVProjectionHead(self.encoder.num_features, HIDDEN, OUT)
        self.prototypes = heads.SwaVPrototypes(OUT, PROTOTYPES, n_steps_frozen_prototypes=round(FROZEN * steps))
        self.criterion = SwaVLoss()

    def loss(self, views: list[Tensor], step: int) -> Tensor:
        self.prototypes.normalize()
        z = [nn.functional.normalize(self.head(self.encoder(view)), dim=1, p=2) for view in views]
        scores = [self.prototypes(of_view, step) for of_view in z]
        return self.criterion(scores[:2], scores[2:]).squeeze()


class DINO(Peer):
    def __init__(self, task: Task, steps: int) -> None:
        super().__init__(task, steps)
        self.head = heads.DINOProjectionHead(self.encoder.num_features, HIDDEN, OUT, PROTOTYPES)
        # copy.deepcopy refuses heads with weight norm, so the teacher's is made anew and filled, as in the examples.
        self.teacher = copy.deepcopy(self.encoder)
        self.teacher_head = heads.DINOProjectionHead(self.encoder.num_features, HIDDEN, OUT, PROTOTYPES)
        self.teacher_head.load_state_dict(self.head.state_dict())
        for part in (self.teacher, self.teacher_head):
            utils.deactivate_requires_grad(part)
        self.criterion = DINOLoss(PROTOTYPES)

    def loss(self, views: list[Tensor], step: int) -> Tensor:
        share = step / self.steps
        momentum = cosine_between(TEACHER["momentum"], TEACHER["final_momentum"], share)
        utils.update_momentum(self.encoder, self.teacher, m=momentum)
        utils.update_momentum(self.head, self.teacher_head, m=momentum)
        with torch.no_grad():
            taught = [self.teacher_head(self.teacher(view)) for view in views[:2]]
        seen = [self.head(self.encoder(view)) for view in views]
        return self.criterion(taught, seen, teacher_temp=line_between(0.04, 0.07, share, 0.3))


class MAE(Peer):
    def __init__(self, task: Task, steps: int) -> None:
        super().__init__(task, steps)
        network, self.patch = self.encoder.network, task.patch
        self.masked = MaskedVisionTransformerTIMM(
            network, weight_initialization="skip", pos_embed_initialization="skip"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the class that the examples use is to be replaced
            self.decoder = MAEDecoderTIMM(
                network.patch_embed.num_patches, task.patch, task.channels, WIDTH, DECODER, 2, HEADS
            )
        self.criterion = nn.MSELoss()

    def loss(self, views: list[Tensor], step: int) -> Tensor:
        (images,) = views
        size = len(images), self.masked.sequence_length
        keep, mask = utils.random_token_mask(size, mask_ratio=0.75, device=images.device)
        encoded = self.decoder.embed(self.masked.encode(images, idx_keep=keep))
        sequence = utils.repeat_token(self.decoder.mask_token, size)
        sequence = utils.set_at_index(sequence, keep, encoded.type_as(sequence))
        guess = self.decoder.predict(utils.get_at_index(self.decoder.decode(sequence), mask))
        target = utils.get_at_index(utils.patchify(images, self.patch), mask - 1)
        return self.criterion(guess, utils.normalize_mean_var(target))


PEERS: dict[str, Callable[[Task, int], Peer]] = {
    "SimCLR": SimCLR,
    "Barlow Twins": BarlowTwins,
    "DINO": DINO,
    "SwAV": SwAV,
    "MAE": MAE,
}
"""By the name of their counterpart in `methods`, which has their views and encoders."""
