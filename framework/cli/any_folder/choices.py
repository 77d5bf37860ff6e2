"""Which recipe for which folder: docs/which-method.md, 'A folder of files', is this table (`as_markdown`)."""

from dataclasses import dataclass

from lightspan.core.errors import UserError

FEW_LABELS = 24
"""Of a class, on average: below it a classifier that trains from scratch has too few to learn from."""


@dataclass(frozen=True)
class Choice:
    """A row of the table.

    Attributes:
        modality: of the files, as recipes name it.
        holds: what the folder holds, in words.
        recipe: to take.
        why: in words.
        instead: other recipes, and when they are better.
        page: of docs/, with the settings of such data.
        labels: "none", "few" or "many" of them; empty where it does not matter.
        form: of texts the form of the lines, of tables the kind of the target; empty of others.
        needs: what else has to be there; empty where the command runs as it is.
    """

    modality: str
    holds: str
    recipe: str
    why: str
    instead: str
    page: str
    labels: str = ""
    form: str = ""
    needs: str = ""


CHOICES = (
    Choice(
        modality="image",
        holds="images without classes",
        labels="none",
        recipe="contrastive/simclr",
        why="it learns fast, on transformers and convolutions alike, and needs no teacher",
        instead="`contrastive/moco` for small batches and long runs; `masked/mae` for transformers, long runs, and "
        "fine-tuning or dense tasks afterwards",
        page="own-images.md",
    ),
    Choice(
        modality="image",
        holds=f"images, fewer than {FEW_LABELS} a class",
        labels="few",
        recipe="contrastive/simclr",
        why="features are learned from all images without their labels, which are too few for a classifier",
        instead="`supervised/linear` if classes look very different; afterwards, heads for few labels on the encoder",
        page="own-images.md",
    ),
    Choice(
        modality="image",
        holds=f"images, {FEW_LABELS} or more a class",
        labels="many",
        recipe="supervised/linear",
        why="there are labels, and a plain classifier is about as good as SupCon on the same classes",
        instead="`contrastive/simclr` if the sub-folders are not what matters; `supervised/look` if the "
        "classes are coarse and finer ones matter later",
        page="own-images.md",
    ),
    Choice(
        modality="volume",
        holds="CT, MR and other volumes",
        recipe="masked/mae_volumes",
        why="it needs no labels, and its drawn guesses show early whether it learns",
        instead="`contrastive/voco` for scans of the same part of the body; `supervised/volume_fusion` before a "
        "segmentation; `supervised/segmenter_volumes` if voxels have labels",
        page="volumes.md",
    ),
    Choice(
        modality="video",
        holds="videos",
        recipe="masked/videomae_small",
        why="it needs no labels and one clip of each video",
        instead="`contrastive/rspnet` if motion matters; `masked/v_jepa` to guess features in place of pixels",
        page="video.md",
    ),
    Choice(
        modality="points",
        holds="point clouds and surfaces",
        recipe="masked/point_mae",
        why="it needs no labels, colours or normals",
        instead="`masked/i2p_mae` with a network of images as a guide; `supervised/p2p` if there are classes",
        page="points.md",
    ),
    Choice(
        modality="graph",
        holds="graphs or molecules",
        recipe="masked/attribute_masking",
        why="it needs no labels, only the kinds of nodes",
        instead="`analysis/feasibility_molecules` to ask first on which molecules to pre-train",
        page="graphs.md",
    ),
    Choice(
        modality="audio",
        holds="recordings",
        recipe="masked/tera",
        why="the spoken content is learned without labels",
        instead="log-mel features without a network to distinguish speakers",
        page="audio.md",
    ),
    Choice(
        modality="text",
        holds="texts",
        form="texts",
        recipe="masked/ul2",
        why="one network learns to fill gaps and to continue texts",
        instead="`language/quickstart` to continue texts alone; `adaptation/lora_chat` to tune a language model",
        page="text.md",
    ),
    Choice(
        modality="text",
        holds="conversations, or prompts with completions",
        form="conversations",
        recipe="adaptation/lora_chat",
        why="LoRA is to be taken where there is no reason for another adapter, and the loss is of the answers alone",
        instead="all weights, where memory is there",
        page="fine-tuning.md",
        needs="a causal language model of transformers with its tokenizer, in the folder `model`",
    ),
    Choice(
        modality="table",
        holds="a table whose target is a number",
        form="number",
        recipe="supervised/table_regression",
        why="it keeps the target's unit",
        instead="`contrastive/supremix` for features that other targets are to be read from",
        page="tables.md",
    ),
    Choice(
        modality="table",
        holds="a table whose target is text, or has few whole numbers",
        form="class",
        recipe="supervised/table_classification",
        why="each value is a class",
        instead="`supervised/table_regression` if the classes are steps of a number",
        page="tables.md",
    ),
)


def choice(modality: str, labels: str = "", form: str = "") -> Choice:
    """The row for such data. Raises: UserError for data that no row is for."""
    for one in CHOICES:
        if one.modality == modality and one.labels in ("", labels) and one.form in ("", form):
            return one
    raise UserError(f"no recipe is chosen for {form or labels} of modality {modality}; name a recipe")


def as_markdown() -> list[str]:
    """The lines of the table on the page."""
    rows = [
        (f"{one.holds} ([{one.page[:-3]}]({one.page}))", f"`{one.recipe}`", one.why, one.instead) for one in CHOICES
    ]
    head = [("the folder holds", "take", "because", "instead"), ("---",) * 4]
    return [f"| {' | '.join(row)} |".replace("| --- ", "|---").replace("--- |", "---|") for row in [*head, *rows]]
