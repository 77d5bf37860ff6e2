"""Networks of timm and torchvision with the weights that were published for them, where these lie on this disk.

Nothing is fetched and nothing is unpickled: what an earlier download left in the cache of the library is read, and what
is not there is named. `lightspan.backbones.pretrained` has networks whose weights come with installable packages.
"""

from pathlib import Path

import timm
import torch
import torchvision
from torch import nn
from transformers.utils import cached_file

from lightspan.backbones.timm_networks import refuse_unknown, timm_network
from lightspan.errors import UserError

# A recipe may name the functions listed here.
__all__ = ["timm_published", "torchvision_published"]


def timm_published(name: str) -> nn.Module:
    """A timm network with its head, and the default weights of its name, such as resnet18 or resnet18.a1_in1k.

    Raises: UserError for an unknown name, or where the cache of Hugging Face does not hold its model.safetensors.
    """
    if name not in (known_names := [*timm.list_models(), *timm.list_pretrained()]):
        refuse_unknown(name, known_names, "timm")
    known = timm.get_pretrained_cfg(name)
    repository = known.hf_hub_id if known is not None else None
    if not repository:
        raise UserError(f"timm names no weights on the Hugging Face hub for {name}; take one that it has them for")
    try:
        file = cached_file(repository, "model.safetensors", local_files_only=True)
    except OSError as error:
        raise UserError(
            f"the weights of {name} are not on this disk: the cache of Hugging Face has no {repository}/"
            f"model.safetensors; where there is a network, `hf download {repository} model.safetensors` fetches them"
        ) from error
    return timm_network(name, pretrained=True, pretrained_cfg_overlay={"file": file})


def torchvision_published(name: str) -> nn.Module:
    """A torchvision network with its head and the default weights of its name, such as resnet18.

    Raises: UserError for an unknown name, or where the cache of torch.hub does not hold its file.
    """
    if name not in (known_names := torchvision.models.list_models()):
        refuse_unknown(name, known_names, "torchvision")
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not file.is_file():
        raise UserError(
            f"the weights of {name} are not on this disk: there is no {file}; where there is a network, "
            f"torchvision.models.get_model({name!r}, weights='DEFAULT') fetches it"
        )
    network = torchvision.models.get_model(name, weights=None)
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network
