"""Stand-ins for what a recipe at the scale of its paper reads: tiny data in the real formats, and weights that are all
zero under the real names and with the real shapes.

What a recipe asks for is found in its merged configuration: every setting that names a place to read
(`lightspan.core.files.places.ReadPath`) gets something at that place, relative to the current folder. A new recipe
needs nothing here unless it reads what no other one has read:

- `runs/NAME/export/safetensors/model.safetensors` is what `lightspan export` writes of a run of the recipe that is
  called NAME, or that some header trains with `--run runs/NAME`: names and shapes are those of that recipe's model.
- Every other file or folder of weights, and every tokenizer, has a row in `PUBLISHED`: the place, and a function that
  writes there what the world has under that name. It is never derived from the recipe that reads it, or nothing would
  be tested; the names come from timm, transformers or the header of the recipe that says how to make the file.
- Data have a row in `DATA`: the class that reads them, and a function that writes a few samples of its format.
"""

import dataclasses
import fnmatch
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from dit_files import published as dit_names
from picture_files import pixels, write_pictures
from shard_files import add_members, lit_clip_shard, png_of
from shipped_recipes import CONFIGS, TREES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch._subclasses import FakeTensorMode
from video_files import numbered, write_video

from lightspan.backbones.dual_encoder import DualEncoder
from lightspan.backbones.generators import ConvGenerator
from lightspan.backbones.text import TextTransformer
from lightspan.cli.config.places import places
from lightspan.cli.config.recipes import catalogue_folder, catalogue_names
from lightspan.cli.config.resolve import Resolved, resolve
from lightspan.cli.config.tree import Node, dotted, plain
from lightspan.cli.planning.shapes import on_meta_first
from lightspan.core.absent import without_missing_weights
from lightspan.core.files.places import PathUse
from lightspan.core.files.tensors import Form, header
from lightspan.datamodules.multispectral.bands import SENSORS
from lightspan.datamodules.shards.fetch import expand_braces
from lightspan.datamodules.worlds.steps import step_members

OF_A_RUN = re.compile(r"runs/([\w.-]+)/export/safetensors/model\.safetensors")
ONE_PROCESS = [
    *("trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto"),
    *("trainer.precision=null", "trainer.logger=null", "trainer.callbacks=null", "trainer.enable_progress_bar=false"),
    *("trainer.accumulate_grad_batches=1", "trainer.max_steps=1", "trainer.limit_val_batches=0"),
]
SAMPLES = 12
"""In each shard, folder of a class or file."""
BATCH = ["data.init_args.batch_size=4", "data.init_args.num_workers=0"]


FEWER = {
    ".deepcluster.": ["model.init_args.prototypes=[4]"],
    ".merging.": [f"model.init_args.backbone.init_args.{flag}" for flag in ("name=test_vit", "image_size=224")],
    ".pela.": ["model.init_args.backbone.init_args.module.init_args.depth=1"],
    ".smae.": ["data.init_args.length=16"],
}
"""Part of a method's class path -> flags: it needs as many samples as it has clusters, reads nine large networks,
computes the SVD of one, or takes a real step whatever its size.
"""


class NoStandIn(Exception):
    """A recipe reads what nothing here can write."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A place that a recipe reads.

    Attributes:
        path: keys of the setting.
        place: as the recipe names it.
        owner: class or builder whose setting it is.
        settings: all of these.
        classes: those that the model tells apart.
    """

    path: tuple[Any, ...]
    place: str
    owner: str
    settings: Mapping[str, Any]
    classes: int = 2

    @property
    def setting(self) -> str:
        """The name of the setting among those of the owner."""
        return str(self.path[max(at for at, key in enumerate(self.path) if key == "init_args") + 1])

    @property
    def run(self) -> str | None:
        """The run whose export this is."""
        found = OF_A_RUN.fullmatch(self.place)
        return found[1] if found else None


def asked(name: str) -> list[Asked]:
    """What a recipe of the catalogue reads, in the order in which it says so."""
    tree = TREES[name]
    classes = CONFIGS[name].get("model", {}).get("init_args", {}).get("num_classes")
    found = []
    read = Node({key: node for key, node in tree.value.items() if key != "trainer"}, tree.where)
    for path, node, use in places(read):  # callbacks, the most of a recipe, read nothing
        if use is PathUse.READ:
            owner = tree
            for key in path[: max(at for at, key in enumerate(path) if key == "init_args")]:
                owner = owner.value[key]
            given = plain(owner)
            found.append(Asked(path, node.value, given["class_path"], given["init_args"], classes or 2))
    return found


def at_scale() -> dict[str, list[Asked]]:
    """The recipes that train on, or start from, what neither a package nor another run brings; and what they read."""
    read = {name: asked(name) for name, config in CONFIGS.items() if "model" in config}
    return {name: found for name, found in read.items() if any(each.run is None for each in found)}


def stand_in(name: str) -> list[str]:
    """Writes all that a recipe reads below the current folder.

    Returns: flags for a batch of few samples and the shards that were written.
    Raises: NoStandIn for what nothing here knows.
    """
    lists: dict[tuple[Any, ...], list[str]] = {}
    found = asked(name)
    for each in sorted(found, key=lambda each: each.run is not None):  # runs may have begun from published weights
        few = expand_braces(each.place)[: 1 + each.settings.get("hold_out", 0)]
        if isinstance(each.path[-1], int):
            lists.setdefault(each.path[:-1], []).extend(few)
        for place in (Path(one) for one in few):
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                write_at(name, each, place)
    return [
        *(f"{dotted(path)}={json.dumps(shards)}" for path, shards in lists.items()),
        *flags_of(resolve(name)),
    ]


def write_at(name: str, each: Asked, place: Path) -> None:
    if (write := published(each.place)) is not None:
        write(place)
    elif each.run is not None:
        write_weights(place, model_of(recipe_of(each.run)))
    elif each.owner in DATA:
        DATA[each.owner](place, each)
    else:
        raise NoStandIn(
            f"{name} reads {each.place} ({dotted(each.path)}), for which tests/stand_ins.py has no stand-in: "
            f"add a row to PUBLISHED for weights or a tokenizer, {each.place!r}, or to DATA for data, {each.owner!r}"
        )


def published(place: str) -> "Write | None":
    return next((PUBLISHED[row] for row in PUBLISHED if fnmatch.fnmatch(place, row)), None)


def flags_of(resolved: Resolved) -> list[str]:
    """Few samples, and no download: what timm or transformers publish under their own names needs no stand-in."""
    given = resolved.config["data"]["init_args"]
    flags = [*ONE_PROCESS, *BATCH]
    flags += ["data.init_args.per_class=2"] if "per_class" in given else []
    flags += ["data.init_args.groups.sizes=[2]", "data.init_args.groups.from_epochs=[0]"] if given.get("groups") else []
    flags += next((less for kind, less in FEWER.items() if kind in resolved.config["model"]["class_path"]), [])
    flags += ["data.init_args.val_size=4"] if "val_size" in given else []
    return flags + [f"{path}.pretrained=false" for path in pretrained(resolved.config["model"], "model")]


def pretrained(config: Any, path: str) -> Iterator[str]:
    """Where a configuration has weights fetched by name."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key == "pretrained" and value is True:
            yield path
        else:
            yield from pretrained(value, f"{path}.{key}")


def recipe_of(run: str) -> str:
    """The recipe whose run a header calls so, or that has the same name. Raises: NoStandIn if there is none."""
    for path in sorted(catalogue_folder().glob("*/*.yaml")):
        if found := re.search(rf"lightspan fit (\S+)[^\n]* --run runs/{re.escape(run)}\b", path.read_text()):
            return found[1]
    try:
        return next(name for name in catalogue_names() if name.split("/")[1] == run)
    except StopIteration:
        raise NoStandIn(
            f"runs/{run} is the run of no recipe; say in a header how to train it, with --run runs/{run}"
        ) from None


def model_of(name: str) -> nn.Module:
    """The model of a recipe, without numbers, whether what it starts from is here or not."""
    for each in asked(name):
        place = Path(each.place)
        if (write := published(each.place)) is not None and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            write(place)  # a folder says what its network is like
    with without_missing_weights():
        return on_meta_first(resolve(name, [], [*ONE_PROCESS, "data=null"]), lambda built: built.model)


def write_weights(path: Path, module: nn.Module, prefix: str = "") -> None:
    """A safetensors file of zeros, which take no room on the disk; tensors that are tied are stored once."""
    first: dict[int, str] = {}
    forms, aliases = {}, {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if (kept := first.setdefault(id(tensor), name)) != name:
            aliases[prefix + name] = prefix + kept
        else:
            forms[prefix + name] = Form(tuple(tensor.shape), tensor.dtype)
    write_forms(path, forms, aliases)


def write_forms(path: Path, forms: Mapping[str, Form], aliases: Mapping[str, str]) -> None:
    begins = header(forms, aliases)
    with path.open("wb") as file:
        file.write(begins)
        file.truncate(len(begins) + sum(form.nbytes for form in forms.values()))


Write = Callable[[Path], None]


def of_module(make: Callable[[], nn.Module], prefix: str = "", **more: tuple[int, ...]) -> Write:
    """Writes the tensors of a module under its own names behind a prefix, and some more."""

    def write(path: Path) -> None:
        with torch.device("meta"):
            forms = {prefix + name: Form(tuple(x.shape), x.dtype) for name, x in make().state_dict().items()}
        write_forms(path, forms | {name: Form(shape, torch.float32) for name, shape in more.items()}, {})

    return write


def of_transformers(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    """A network of transformers with the settings of its config."""
    return lambda: getattr(transformers, kind)(getattr(transformers, kind).config_class(**settings))


def folder(kind: str, tokenizer: Write, **settings: Any) -> Write:
    """A folder as transformers writes it: settings, weights and tokenizer."""

    def write(place: Path) -> None:
        place.mkdir()
        config = getattr(transformers, kind).config_class(**settings)
        config.architectures = [kind]
        config.save_pretrained(place)
        with torch.device("meta"):
            write_weights(place / "model.safetensors", getattr(transformers, kind)(config))
        tokenizer(place)

    return write


def words(size: int, sentinels: int = 0, **special: int) -> Write:
    """A fast tokenizer with `size` numbers: any word has one of them, and special tokens have their published ones;
    sentinels are the last ones.
    """
    more = {f"<extra_id_{number}>": size - 1 - number for number in range(sentinels)}

    def write(place: Path) -> None:
        place.mkdir(exist_ok=True)
        named = {number: token for token, number in (special | more | {"negative": 3, "positive": 4}).items()}
        vocabulary = {named.get(number, f"word{number}"): number for number in range(size)}
        made = Tokenizer(WordLevel(vocabulary, unk_token=f"word{size // 2}"))
        made.pre_tokenizer = Whitespace()
        first, last = (next((t for t in names if t in special), None) for names in (FIRST, LAST))
        around = [*([first] if first else []), "$A", *([last] if last else [])]
        made.post_processor = TemplateProcessing(
            single=" ".join(around), special_tokens=[(token, special[token]) for token in {first, last} - {None}]
        )
        roles = {"pad_token": PAD, "bos_token": FIRST, "eos_token": LAST, "mask_token": ("[MASK]",)}
        known = {role: next((t for t in names if t in special), None) for role, names in roles.items()}
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=made,
            additional_special_tokens=list(more),
            **{role: token for role, token in known.items() if token},
        ).save_pretrained(place)

    return write


PAD, FIRST, LAST = ("[PAD]", "<pad>"), ("[CLS]", "<|startoftext|>"), ("[SEP]", "<|endoftext|>", "</s>")
CLIP_TOKENS = words(49408, **{"<|startoftext|>": 49406, "<|endoftext|>": 49407, "<pad>": 0})
BERT_TOKENS = words(30522, **{"[PAD]": 0, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103})
T5_TOKENS = words(32100, 100, **{"<pad>": 0, "</s>": 1})


def clip_b16() -> nn.Module:
    return DualEncoder(timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=0), TextTransformer())


def clip_b32() -> nn.Module:
    """A small network of timm's in place of ViT-B/32: nine of these are 3 GB."""
    return timm.create_model("test_vit", num_classes=512, img_size=224)


def dit(path: Path) -> None:
    with FakeTensorMode():
        tensors = dit_names(side=32, chans=4, width=1152, depth=28, classes=1000)
    write_forms(path, {name: Form(tuple(x.shape), torch.float16) for name, x in tensors.items()}, {})


def deit(path: Path) -> None:
    """As the header of compression/pela_imagenet has it, of one block, whose SVD takes a second."""
    with torch.device("meta"):
        tensors = timm.create_model("deit_base_patch16_224.fb_in1k").state_dict()
    kept = (name for name in tensors if "blocks." not in name or name.startswith("blocks.0."))
    forms = {name: Form(tuple(tensors[name].shape), tensors[name].dtype) for name in kept}
    write_forms(path, {n if n.startswith("head.") else f"backbone.{n}": form for n, form in forms.items()}, {})


def heads_of_clip(path: Path) -> None:
    write_forms(path, {"head.weight": Form((CLASSES[path.stem], 512), torch.float32)}, {})


CLASSES = {"sun397": 397, "cars": 196, "resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47}

SMALL = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
"""Of a folder that alone says how large its network is; the recipe names none of its sizes."""
LLAMA = folder("LlamaForCausalLM", words(2048, **{"<pad>": 0, "</s>": 1}), **SMALL)

LLAVA = folder(
    *("LlavaNextForConditionalGeneration", words(32064, **{"<pad>": 0, "</s>": 2})),
    vision_config={"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    | {"image_size": 336, "patch_size": 14, "model_type": "clip_vision_model"},
    text_config=SMALL | {"vocab_size": 32064, "max_position_embeddings": 4096, "model_type": "llama"},
)


def stable_video(place: Path) -> None:
    """With the first and the last widths of the published one, and one layer at two levels."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")
    parts = {"down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"]}
    parts |= {"up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"]}
    sizes = {"block_out_channels": [320, 320], "layers_per_block": 1, "num_attention_heads": [5, 5]}
    with torch.device("meta"):
        unet = diffusers.UNetSpatioTemporalConditionModel(**parts, **sizes)
    unet.save_config(place / "unet")
    write_weights(place / "unet" / "diffusion_pytorch_model.safetensors", unet)


PUBLISHED: dict[str, Write] = {
    "stable-video": stable_video,
    "dinov2_vits14.safetensors": of_module(
        lambda: timm.create_model("vit_small_patch14_dinov2", num_classes=0), mask_token=(1, 384)
    ),
    "dinov2_vitl14.safetensors": of_module(
        lambda: timm.create_model("vit_large_patch14_dinov2", num_classes=0), mask_token=(1, 1024)
    ),
    "dinov3_vitl16.safetensors": of_module(lambda: timm.create_model("vit_large_patch16_dinov3", num_classes=0)),
    "dino_vits16.safetensors": of_module(lambda: timm.create_model("vit_small_patch16_224", num_classes=0)),
    "source_generator.safetensors": of_module(
        lambda: ConvGenerator(512, 3, 256, (512, 512, 512, 256, 128, 64)), "generator."
    ),
    "flava-image-codebook/model.safetensors": of_module(of_transformers("FlavaImageCodebook")),
    "runs/mit_b5/model.safetensors": of_module(
        of_transformers("SegformerModel", depths=[3, 6, 40, 3], hidden_sizes=[64, 128, 320, 512]), "network."
    ),
    "runs/mae_vit_l/export/*": of_module(
        lambda: timm.create_model("vit_large_patch16_224", num_classes=0), "backbone.network."
    ),
    "runs/bert": folder("BertForPreTraining", BERT_TOKENS),
    "runs/t5": folder(
        *("T5ForConditionalGeneration", T5_TOKENS),
        vocab_size=32128,
        d_model=768,
        d_ff=2048,
        d_kv=64,
        num_heads=12,
        num_layers=12,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "runs/clip/vit_b16.safetensors": of_module(clip_b16, "encoders."),
    "runs/clip/bank.safetensors": lambda path: write_forms(path, {"bank": Form((8, 197, 512), torch.float32)}, {}),
    "runs/deit_b.safetensors": deit,
    "dit_xl_2_256.safetensors": dit,
    "runs/llama": LLAMA,
    "runs/llama2": LLAMA,
    "runs/llava": LLAVA,
    "model": LLAMA,
    "runs/roberta_*": folder("RobertaForMaskedLM", words(2048, **{"<pad>": 1, "</s>": 2}), **SMALL),
    "runs/clip/vit_b16": folder("CLIPModel", CLIP_TOKENS, vision_config={"patch_size": 16}),
    "runs/clip/tokenizer": CLIP_TOKENS,
    "pairs/tokenizer": CLIP_TOKENS,
    "c4/tokenizer": words(32000, **{"<pad>": 0, "</s>": 1}),
    "runs/clip/heads/*.safetensors": heads_of_clip,
    "runs/clip/*.safetensors": of_module(clip_b32, "backbone."),
}
"""Place -> what the world has there. The first row that matches counts."""


TEXT = " ".join(f"word{number}" for number in range(200)).encode()


def array(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


def said(value: Any) -> bytes:
    return json.dumps(value).encode()


def shard(sample: Callable[[int, Asked], dict[str, bytes]]) -> Callable[[Path, Asked], None]:
    """Writes a tar file of a few samples, each as ending -> content."""

    def write(path: Path, each: Asked) -> None:
        with tarfile.open(path, "w") as archive:
            for number in range(SAMPLES):
                add_members(archive, f"{number:04}", sample(number, each))

    return write


def agent_step(number: int, each: Asked) -> dict[str, bytes]:
    """Of a robot whose actions are four numbers, or one of several."""
    actions, frames = each.settings.get("actions", 7), [pixels(2 * number + at, 84, 84) for at in (0, 1)]
    action = np.linspace(-1, 1, 4, dtype=np.float32) if actions is None else np.int64(number % actions)
    members = step_members("", frames, number % 2, "go", action=action, state=np.zeros(39, np.float32))
    return {name[1:]: content for name, content in members.items()}


def by_fields(number: int, each: Asked) -> dict[str, bytes]:
    """Of `Shards`, whose setting `fields` says which members a sample has."""
    endings = each.settings.get("fields", {"image": "png", "label": "cls"}).values()
    known = {"png": png_of(pixels(number, 48, 64)), "cls": str(number % 2).encode(), "txt": TEXT, "json": said({})}
    return {ending: known[ending] for field in endings for ending in [pick(field, known)]}


def pick(field: str, known: Mapping[str, bytes]) -> str:
    return next(ending for ending in field.split("|") if ending in known)


def spectral(number: int, each: Asked) -> dict[str, bytes]:
    stored = each.settings["bands"]["stored"]
    bands = len(SENSORS[stored] if isinstance(stored, str) else stored)
    dates = each.settings.get("dates")
    shape = (bands, 40, 40) if dates is None else (dates, bands, 40, 40)
    return {"npy": array(np.random.default_rng(number).integers(1, 9000, shape).astype(np.uint16))}


def seasons(number: int, each: Asked) -> dict[str, bytes]:
    return spectral(number, dataclasses.replace(each, settings={**each.settings, "dates": 2})) | {
        "json": said({"present": [number % each.settings["num_tags"]]})
    }


def renders(number: int, each: Asked) -> dict[str, bytes]:
    table = np.random.default_rng(number).normal(size=(2, each.settings.get("columns", 4))).astype(np.float32)
    pictures = {f"{at:03}.png": png_of(pixels(2 * number + at, 48, 48)) for at in range(2)}
    return {**pictures, "npy": array(table), "cls": str(number).encode()}


def sound(number: int, each: Asked) -> dict[str, bytes]:
    from sound_files import encoded, tone  # which needs a package

    return {"wav": encoded(tone(1.0, hz=300 + number))}


def picture_and(**others: Callable[[int], bytes]) -> Callable[[int, Asked], dict[str, bytes]]:
    """A picture, and members that come with it, by ending."""
    return lambda number, _: {
        "png": png_of(pixels(number, 48, 64)),
        **{ending.replace("_", "."): content(number) for ending, content in others.items()},
    }


def lit_clips(place: Path, each: Asked) -> None:
    """Of the sizes that the authors' networks have: a batch, which is 50 MB."""
    lit_clip_shard(place, 4, shape=(4, 16, 64, 64), pixels=(512, 512), embedding=1024)


def folder_of_pictures(place: Path, each: Asked) -> None:
    write_pictures(place, {f"class{number:02}": SAMPLES for number in range(each.classes)})


def folder_of_places(place: Path, each: Asked) -> None:
    for number in range(SAMPLES):
        for part in ("train/database", "train/queries", "val/database", "val/queries"):
            (place / part).mkdir(parents=True, exist_ok=True)
            name = f"@{690000 + 100 * number:.2f}@5330000.00@32@U@48.1@11.5@id{number}@@@@@@@.png"
            (place / part / name).write_bytes(png_of(pixels(number, 48, 64)))


def folder_of_videos(place: Path, each: Asked) -> None:
    rate = round(each.settings.get("fps") or 25)
    for number in range(SAMPLES):
        write_video(place / "a" / f"{number}.mkv", numbered(2 * each.settings["frames"], 32, number), rate=rate)


def answered_videos(place: Path, each: Asked) -> None:
    """Either the folder of the videos, or lines that ask about them."""
    if each.setting != "folder":
        rows = [
            {"video": f"a/{n}.mkv", "question": "word1 <video> word2 ", "answer": f"word{n}"} for n in range(SAMPLES)
        ]
        place.write_text("\n".join(map(json.dumps, rows)))
        return
    for number in range(SAMPLES):
        write_video(place / "a" / f"{number}.mkv", numbered(20, 32, number))


def folder_of_volumes(place: Path, each: Asked) -> None:
    from volume_files import noise, write_nifti  # which need packages

    for number in range(SAMPLES):
        for pattern in (each.settings.get("modalities") or {"volume": "{subject}"}).values():
            write_nifti(place / f"{pattern.format(subject=f's{number}').replace('*', 'x')}.nii.gz", noise(number))


def folder_of_radiance(place: Path, each: Asked) -> None:
    place.mkdir(parents=True)
    for number in range(SAMPLES):
        grid = np.random.default_rng(number).normal(size=(20, 17, 12, 4)).astype(np.float32)
        np.savez(place / f"scene{number}.npz", rgbsigma=grid, resolution=np.array(grid.shape[:3]))


def folder_of_points(place: Path, each: Asked) -> None:
    from point_files import CUBE, ply

    for number in range(SAMPLES):
        for name in ("a", "b"):
            (place / name).mkdir(parents=True, exist_ok=True)
            (place / name / f"{number}.ply").write_bytes(ply(CUBE * [1 + number, 1, 1]))


def folder_of_scans(place: Path, each: Asked) -> None:
    from point_files import write_scans

    write_scans(place, SAMPLES)


def modelnet(place: Path, each: Asked) -> None:
    from point_files import CUBE, off

    for number in range(SAMPLES):
        for part in ("a/train", "a/test", "b/train", "b/test"):
            (place / part).mkdir(parents=True, exist_ok=True)
            (place / part / f"{part[0]}_{number:04}.off").write_text(off(CUBE * [1 + number, 1, 1]))


def folder_of_molecules(place: Path, each: Asked) -> None:
    place.mkdir(parents=True)
    (place / "a.csv").write_text("smiles\n" + "".join(f"{'C' * (1 + number)}O\n" for number in range(2000)))


def reviews(place: Path, each: Asked) -> None:
    place.write_text("".join(json.dumps({"text": f"word{n} " * 20, "label": n % 2}) + "\n" for n in range(40)))


def labelled(place: Path, each: Asked) -> None:
    rows = [{**dict.fromkeys(each.settings["fields"], f"word{n} word9"), "label": n % 2} for n in range(SAMPLES)]
    place.write_text("\n".join(map(json.dumps, rows)))


def conversations(place: Path, each: Asked) -> None:
    rows = [{"prompt": f"word{n}", "completion": "word8 word9"} for n in range(SAMPLES)]
    place.write_text("\n".join(map(json.dumps, rows)))


def sequences(place: Path, each: Asked) -> None:
    values = np.random.default_rng(len(place.name)).integers(256, size=(40, 1024)).astype(np.uint8)
    np.savez(place, sequences=values, labels=np.arange(40) % 10)


DATAMODULES = "lightspan.datamodules."
DATA: dict[str, Callable[[Path, Asked], None]] = {
    f"{DATAMODULES}{name}": write
    for name, write in {
        "shards.stream.Shards": shard(by_fields),
        "shards.posed.PosedShards": shard(renders),
        "shards.paired.PairedShards": shard(
            lambda n, _: {f"{at}.png": png_of(pixels(2 * n + at, 48, 48)) for at in (1, 2)}
        ),
        "shards.tagged.TaggedShards": shard(picture_and(json=lambda n: said({"present": [n], "absent": [n + 4]}))),
        "shards.words.WordShards": shard(picture_and(txt=lambda n: b"word")),
        "shards.masked.MaskedShards": shard(
            picture_and(mask_png=lambda n: png_of((pixels(n, 48, 64)[..., 0] % 2).astype(np.uint8)))
        ),
        "shards.domains.DomainShards": shard(
            picture_and(mask_png=lambda n: png_of((pixels(n, 48, 64)[..., 0] % 19).astype(np.uint8)))
        ),
        "shards.texts.WholeWordShards": shard(lambda n, _: {"txt": TEXT}),
        "shards.texts.QueryShards": shard(
            lambda n, _: {"json": said({"query": "word1 word2", "document": "word3", "negatives": ["word4"] * 7})}
        ),
        "shards.recordings.RecordingShards": shard(sound),
        "shards.latents.LatentShards": shard(
            lambda n, _: {"npy": array(np.random.default_rng(n).normal(size=(8, 32, 32)).astype(np.float16))}
        ),
        "shards.lit_clips.LitClipShards": lit_clips,
        "text.chat.Chat": conversations,
        "text.labelled.LabelledTextFiles": labelled,
        "text.shards.TextShards": shard(lambda n, _: {"txt": TEXT}),
        "image_text.pairs.ImageTextShards": shard(picture_and(txt=lambda n: TEXT, cls=lambda n: b"1")),
        "image_text.partial.PartlyLabelledShards": shard(picture_and(txt=lambda n: TEXT, cls=lambda n: b"1")),
        "multispectral.shards.MultispectralShards": shard(spectral),
        "multispectral.seasons.SeasonShards": shard(seasons),
        "image.folder.ImageFolder": folder_of_pictures,
        "image.places.PlaceFolder": folder_of_places,
        "video.folder.VideoFolder": folder_of_videos,
        "video.captioned.CaptionedVideos": answered_videos,
        "worlds.steps.StepShards": shard(agent_step),
        "volume.folder.VolumeFolder": folder_of_volumes,
        "volume.radiance.RadianceFolder": folder_of_radiance,
        "points.folder.PointFolder": folder_of_points,
        "points.labelled.LabelledScans": folder_of_scans,
        "points.sets.modelnet.ModelNet40": modelnet,
        "graph.folder.GraphFolder": folder_of_molecules,
        "text.domains.DomainFiles": reviews,
        "text.spelling.WordList": lambda place, _: place.write_text("\n".join(f"word{n}" for n in range(2000))),
        "sequence.own.OwnSequences": sequences,
    }.items()
}
"""Class that reads data -> what writes them: it gets the place, and all settings of the class."""
