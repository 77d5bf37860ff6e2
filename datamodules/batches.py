"""The batches that datamodules give to methods: typed mappings, one for each modality.

Shapes: B samples on this rank in one micro-batch, T context length, frames or, of pictures from satellites, dates, L
steps, S samples of a wave, C H W image, V views, P parameters or documents, U tokens of a document, K tasks or places
for objects, F columns, G tags.
"""

from typing import Generic, NamedTuple, NotRequired, TypedDict, TypeVar

from torch import Tensor

T = TypeVar("T")


class TextBatch(TypedDict):
    """Windows of text as token ids.

    tokens: int64 [B, T+1], each in [0, vocab_size). `tokens[:, :-1]` is read, `tokens[:, 1:]` is predicted.
    """

    tokens: Tensor


class DocumentBatch(TypedDict):
    """Pieces of documents, padded to one length.

    tokens: int64 [B, T], without special tokens; 0 on padding, which is at the end.
    mask: int64 [B, T], 1 where a token is the text's own and 0 on padding.
    token_bytes: int64 [B, T], bytes of the real text that a token stands for; 0 on padding.
    index: int64 [B], the piece's position in its dataset.
    """

    tokens: Tensor
    mask: Tensor
    token_bytes: Tensor
    index: Tensor


class ChatBatch(TypedDict):
    """Conversations, or prompts with their completions, padded to one length.

    tokens: int64 [B, T]; 0 on padding, which is at the end.
    mask: int64 [B, T], the conversation that a token belongs to, from 1 up in each row; 0 on padding. Several may share
        a row, side by side.
    learned: int64 [B, T], 1 where a token is to be predicted from those before it in its conversation.
    index: int64 [B], the position in its dataset of a row's first conversation.
    """

    tokens: Tensor
    mask: Tensor
    learned: Tensor
    index: Tensor


class DenoisingBatch(TypedDict):
    """Corrupted texts and what is missing in them, see `lightspan.datamodules.text.denoising`.

    Several texts may share a row; all that belongs to one has its segment, and its parts stand side by side.

    inputs: int64 [B, T], texts with a sentinel in place of each hidden span.
    input_segments: int64 [B, T], the text that a token belongs to, from 1 up in each row; 0 on padding.
    decoder_inputs: int64 [B, U], targets moved on by one token, behind a token that begins each text.
    targets: int64 [B, U], sentinels and hidden spans of each text.
    target_segments: int64 [B, U], as input_segments.
    target_bytes: int64 [B, U], bytes of the real text that a target token stands for; 0 for all others.
    denoiser: int64 [B, U], the place in the mixture of what hid this span; 0 on padding.
    index: int64 [B], the position in its dataset of the first text in a row.
    """

    inputs: Tensor
    input_segments: Tensor
    decoder_inputs: Tensor
    targets: Tensor
    target_segments: Tensor
    target_bytes: Tensor
    denoiser: Tensor
    index: Tensor


class LabelledTextBatch(TypedDict):
    """Tokenized texts, truncated or padded to one length, each with its class.

    tokens: int64 [B, T].
    mask: int64 [B, T], 1 where a token is the text's own and 0 on padding, which is at the end.
    label: int64 [B], each in [0, num_classes).
    index: int64 [B], the sample's position in its dataset.
    """

    tokens: Tensor
    mask: Tensor
    label: Tensor
    index: Tensor


class LabelledPairBatch(LabelledTextBatch):
    """A `LabelledTextBatch` with two texts in each row, one behind the other.

    tokens: int64 [B, T].
    mask: int64 [B, T].
    label: int64 [B], each in [0, num_classes).
    index: int64 [B].
    token_types: int64 [B, T], 1 on the second text where the tokenizer tells them apart, 0 elsewhere.
    """

    token_types: Tensor


class PromptBatch(TypedDict):
    """Texts in a prompt, whose label is the next thing to say, see `lightspan.datamodules.text.domains`.

    inputs: int64 [B, T], the prompt with the text in it.
    input_segments: int64 [B, T], 1 where a token belongs to it; 0 on padding, which is at the end.
    choices: int64 [B, K, U], the words of each label, which are the same for all texts.
    decoder_inputs: int64 [B, K, U], choices moved on by one token, behind a token that begins each.
    choice_segments: int64 [B, K, U], as input_segments.
    label: int64 [B], each in [0, K).
    target_inputs: int64 [B, T], of another text, of the target domain, which has no label. Absent where none is to be
        aligned, as in validation.
    target_input_segments: int64 [B, T].
    index: int64 [B], the labelled text's position in its dataset.
    """

    inputs: Tensor
    input_segments: Tensor
    choices: Tensor
    decoder_inputs: Tensor
    choice_segments: Tensor
    label: Tensor
    target_inputs: NotRequired[Tensor]
    target_input_segments: NotRequired[Tensor]
    index: Tensor


class TokenPairBatch(TypedDict):
    """Queries and documents: of each query first the one that answers it, then, if P > 1, others that do not.

    tokens: int64 [B, T], of the query with its special tokens.
    mask: int64 [B, T], 1 where a token is the query's own and 0 on padding, which is at the end.
    document_tokens: int64 [B, P, U].
    document_mask: int64 [B, P, U].
    index: int64 [B], the query's position in its dataset.
    """

    tokens: Tensor
    mask: Tensor
    document_tokens: Tensor
    document_mask: Tensor
    index: Tensor


class ScoredPairBatch(TokenPairBatch):
    """Pairs of texts, P = 1, and how alike they are.

    tokens: int64 [B, T].
    mask: int64 [B, T].
    document_tokens: int64 [B, P, U].
    document_mask: int64 [B, P, U].
    index: int64 [B].
    score: float32 [B], larger for pairs that are more alike, in the unit of the data.
    """

    score: Tensor


class WholeWordBatch(TypedDict):
    """Tokenized texts, truncated or padded to one length, whose words are known.

    tokens: int64 [B, T], with special tokens.
    mask: int64 [B, T], 1 where a token is the text's own and 0 on padding, which is at the end.
    word: int64 [B, T], counted from 0 the word of the text that a token is part of; -1 for special tokens and padding.
    index: int64 [B], the text's position in its dataset.
    """

    tokens: Tensor
    mask: Tensor
    word: Tensor
    index: Tensor


class SequenceBatch(TypedDict):
    """Sequences of values, all of one length, each with its class.

    sequence: float32 [B, L, C], C numbers of each of L steps, normalised as the data module says.
    label: int64 [B], each in [0, num_classes). A method that learns without labels ignores it.
    index: int64 [B], the sample's position in its dataset; the same on every rank and in every epoch.
    """

    sequence: Tensor
    label: Tensor
    index: Tensor


class AudioBatch(TypedDict):
    """Recordings at one sample rate, which the data module says as `rate`, padded with zeros at the end.

    wave: float32 [B, S], one channel, mostly in [-1, 1].
    length: int64 [B], samples of each recording before its padding, in [1, S].
    label: int64 [B], each in [0, num_classes); 0 where the data have no labels.
    index: int64 [B], the sample's position in its dataset; the same on every rank and in every epoch.
    """

    wave: Tensor
    length: Tensor
    label: Tensor
    index: Tensor


class SpokenBatch(AudioBatch):
    """Spoken captions, see `lightspan.datamodules.audio.spoken`.

    wave: float32 [B, S].
    length: int64 [B].
    label: int64 [B], the language.
    index: int64 [B].
    keyword: int64 [B], what the caption speaks of: a place in `KEYWORDS`; the number of these if none of them.
    """

    keyword: Tensor


class SpeechBatch(AudioBatch):
    """Generated speech with exact labels, see `lightspan.datamodules.rendered.speech`.

    wave: float32 [B, S].
    length: int64 [B].
    label: int64 [B], the speaker.
    index: int64 [B].
    phone: int64 [B, T], the phone in the middle of each frame of 25 ms every 10 ms; -1 where there is none.
    """

    phone: Tensor


class ImageBatch(TypedDict):
    """One picture per sample, standardised per channel to about zero mean and unit variance.

    image: float32 [B, C, H, W].
    label: int64 [B], each in [0, num_classes). A method that learns without labels ignores it.
    index: int64 [B], the sample's position in its dataset; the same on every rank and in every epoch.
    """

    image: Tensor
    label: Tensor
    index: Tensor


class ViewParameters(NamedTuple, Generic[T]):
    """How a view came from its picture, in the order of the steps. In brackets: what leaves the picture as it is.

    top, left, height, width: the crop, as shares of the picture's height and width [0 0 1 1]. What lies outside the
        picture is black.
    angle: degrees, counter-clockwise [0].
    mirrored: 1 if left and right are swapped [0].
    brightness, contrast, saturation: factors [1].
    hue: turns of the colour circle [0].
    grey: 1 if the colours are gone [0].
    blur: standard deviation of a Gaussian, in pixels of the view [0].
    solarised: 1 if what is brighter than half is inverted [0].
    grain: standard deviation of the noise on each pixel, where white is 1 [0].
    """

    top: T
    left: T
    height: T
    width: T
    angle: T
    mirrored: T
    brightness: T
    contrast: T
    saturation: T
    hue: T
    grey: T
    blur: T
    solarised: T
    grain: T


class ViewsBatch(TypedDict):
    """Several views of each picture. Row i of every view comes from the same picture, or from the same scene.

    views: V tensors, float32 [B, C, H, W], standardised as in `ImageBatch`; H and W may differ between views.
    parameters: float32 [B, V, P], what made each view. `ViewParameters(*batch["parameters"].unbind(2))` names those of
        `lightspan.datamodules.image.augment.views`, each [B, V]; data that know more of their views (a pose, a light)
        have columns of their own. Absent where views are made without them.
    label: int64 [B].
    index: int64 [B].
    """

    views: list[Tensor]
    parameters: NotRequired[Tensor]
    label: Tensor
    index: Tensor


class TaggedBatch(TypedDict):
    """Pictures with tags, of which any number may hold of one picture.

    image: float32 [B, C, H, W], standardised as in `ImageBatch`.
    tags: int64 [B, G], 1 for each tag that holds.
    tags_known: int64 [B, G], 0 where it is not known whether a tag holds; `tags` is then 0.
    index: int64 [B].
    """

    image: Tensor
    tags: Tensor
    tags_known: Tensor
    index: Tensor


class TaggedViewsBatch(TypedDict):
    """Several views of each picture, as in `ViewsBatch`, with the tags of a `TaggedBatch`.

    views: V tensors, float32 [B, C, H, W].
    parameters: float32 [B, V, P]. Absent where views are made without them.
    tags: int64 [B, G].
    tags_known: int64 [B, G].
    index: int64 [B].
    """

    views: list[Tensor]
    parameters: NotRequired[Tensor]
    tags: Tensor
    tags_known: Tensor
    index: Tensor


class PairBatch(TypedDict):
    """Two photographs of each scene, of which nothing else is known.

    views: V tensors, float32 [B, C, H, W], standardised as in `ImageBatch`; V is 2.
    index: int64 [B], the pair's position in its dataset.
    """

    views: list[Tensor]
    index: Tensor


class TasksBatch(TypedDict):
    """One picture of each of several tasks a sample, standardised as each task's own.

    image: float32 [B, K, C, H, W], of the tasks in their order.
    label: int64 [B, K], each a class of its task. A method that learns without labels leaves it alone.
    index: int64 [B], the sample's number; a task's own sample is that number modulo its size.
    """

    image: Tensor
    label: Tensor
    index: Tensor


class ImageTextBatch(TypedDict):
    """Pictures with a text each. Row i of picture and text are one pair.

    image: float32 [B, C, H, W], standardised as in `ImageBatch`.
    tokens: int64 [B, T], of the text with its special tokens.
    mask: int64 [B, T], 1 where a token is the text's own and 0 on padding, which is at the end.
    index: int64 [B], the sample's position in its dataset.
    """

    image: Tensor
    tokens: Tensor
    mask: Tensor
    index: Tensor


class LabelledImageTextBatch(ImageTextBatch):
    """An `ImageTextBatch` whose pictures also have a class.

    image: float32 [B, C, H, W].
    tokens: int64 [B, T].
    mask: int64 [B, T].
    index: int64 [B].
    label: int64 [B], each in [0, num_classes).
    """

    label: Tensor


class PartlyLabelledBatch(ImageTextBatch):
    """An `ImageTextBatch` of which some pictures have no text, and some a class.

    image: float32 [B, C, H, W].
    tokens: int64 [B, T]; those of an empty text where there is none.
    mask: int64 [B, T].
    index: int64 [B].
    caption_known: int64 [B], 0 where there is no text.
    label: int64 [B], each in [0, num_classes); 0 where there is none.
    label_known: int64 [B], 0 where there is no class.
    """

    caption_known: Tensor
    label: Tensor
    label_known: Tensor


class SceneBatch(TypedDict):
    """Rendered scenes with exact labels of objects and pixels, see `lightspan.datamodules.rendered.scenes`.

    Objects are listed from the nearest to the farthest; places beyond the last object of a scene hold -1, or 0.

    image: float32 [B, C, H, W], standardised as in `ImageBatch`.
    instances: int64 [B, H, W], 0 for the ground, else 1 + the place of the object that can be seen.
    semantic: int64 [B, H, W], 0 for the ground, else 1 + that object's shape.
    depth: float32 [B, H, W], of what can be seen, in (1, 10]; the ground's is 10.
    shape: int64 [B, K], a place in `SHAPES`.
    colour: int64 [B, K], a place in `COLOURS`.
    texture: int64 [B, K], a place in `TEXTURES`.
    size: int64 [B, K], a place in `SIZES`.
    pose: float32 [B, K, 4]: x and y of the centre and the radius, in pixels, and the angle in radians.
    visible: float32 [B, K], the share of an object's pixels that no nearer one hides, in [0, 1].
    hides: int64 [B, K, K], 1 where object i lies in front of a pixel of object j.
    tags: int64 [B, G], 1 for each of `TAGS` that holds of an object that can be seen.
    tags_known: int64 [B, G], 0 for the tags that a method must not read.
    label: int64 [B], the shape of the object with the most pixels in sight; the number of shapes if there is none.
    label_known: int64 [B], 0 where a method must not read the label.
    index: int64 [B], the sample's position in its dataset.
    """

    image: Tensor
    instances: Tensor
    semantic: Tensor
    depth: Tensor
    shape: Tensor
    colour: Tensor
    texture: Tensor
    size: Tensor
    pose: Tensor
    visible: Tensor
    hides: Tensor
    tags: Tensor
    tags_known: Tensor
    label: Tensor
    label_known: Tensor
    index: Tensor


class SceneViewsBatch(SceneBatch):
    """A `SceneBatch` whose scenes also have several views, which are random variants of the image. Labels of pixels are
    those of the image; a tag may hold of what a view has cut off.

    image: float32 [B, C, H, W].
    instances: int64 [B, H, W].
    semantic: int64 [B, H, W].
    depth: float32 [B, H, W].
    shape: int64 [B, K].
    colour: int64 [B, K].
    texture: int64 [B, K].
    size: int64 [B, K].
    pose: float32 [B, K, 4].
    visible: float32 [B, K].
    hides: int64 [B, K, K].
    tags: int64 [B, G].
    tags_known: int64 [B, G].
    label: int64 [B].
    label_known: int64 [B].
    index: int64 [B].
    views: V tensors, float32 [B, C, H, W], standardised as the image; H and W may differ between views.
    parameters: float32 [B, V, P], as in `ViewsBatch`; absent where views are made without them.
    """

    views: list[Tensor]
    parameters: NotRequired[Tensor]


class CaptionedSceneBatch(SceneBatch):
    """A `SceneBatch` whose scenes also have a sentence.

    image: float32 [B, C, H, W].
    instances: int64 [B, H, W].
    semantic: int64 [B, H, W].
    depth: float32 [B, H, W].
    shape: int64 [B, K].
    colour: int64 [B, K].
    texture: int64 [B, K].
    size: int64 [B, K].
    pose: float32 [B, K, 4].
    visible: float32 [B, K].
    hides: int64 [B, K, K].
    tags: int64 [B, G].
    tags_known: int64 [B, G].
    label: int64 [B].
    label_known: int64 [B].
    index: int64 [B].
    tokens: int64 [B, T], of the sentence with its special tokens.
    mask: int64 [B, T], 1 where a token is the sentence's own and 0 on padding, which is at the end.
    caption_known: int64 [B], 0 where a method must not read the sentence.
    """

    tokens: Tensor
    mask: Tensor
    caption_known: Tensor


class DomainsBatch(TypedDict):
    """Two pictures a sample, of different scenes in different styles, each with the class of each pixel.

    image: float32 [B, C, H, W], in the source style, standardised with the moments of that style.
    semantic: int64 [B, H, W], each in [0, num_classes), or -1 where a pixel has no class.
    target_image: float32 [B, C, H, W], in the target style, standardised with the source's moments.
    target_semantic: int64 [B, H, W], which a method reads to judge itself, not to learn. Absent in training where the
        target has no masks.
    index: int64 [B].
    """

    image: Tensor
    semantic: Tensor
    target_image: Tensor
    target_semantic: NotRequired[Tensor]
    index: Tensor


class ScenePairBatch(TypedDict):
    """Two rendered views of each scene, with known cameras, see `lightspan.datamodules.rendered.pairs`.

    A point X of the first camera's coordinates is rotation X + translation in the second's. Pixels have their middles
    at whole numbers.

    views: V tensors, float32 [B, C, H, W], standardised as in `ImageBatch`; V is 2.
    depth: float32 [B, V, H, W], along the axis of the view's camera.
    matches: float32 [B, V, H, W, 2]: x and y in the other view, in pixels, of the point that a pixel shows.
    covisible: int64 [B, V, H, W], 1 where the other view shows that point too.
    rotation: float32 [B, 3, 3].
    turn: float32 [B, 3], the same as a vector: its axis times its angle, in radians.
    translation: float32 [B, 3], in the unit of the depths.
    intrinsics: float32 [B, 3, 3], of both cameras.
    label: int64 [B], how many boxes a scene has more than the fewest.
    index: int64 [B], the sample's position in its dataset.
    """

    views: list[Tensor]
    depth: Tensor
    matches: Tensor
    covisible: Tensor
    rotation: Tensor
    turn: Tensor
    translation: Tensor
    intrinsics: Tensor
    label: Tensor
    index: Tensor


class PersonBatch(TypedDict):
    """Rendered pictures of persons in tracklets, see `lightspan.datamodules.rendered.persons`.

    image: float32 [B, C, H, W], standardised as in `ImageBatch`.
    label: int64 [B], the person that the tracklet is said to show, counted from 0 in the set.
    identity: int64 [B], the person that the picture shows, numbered over all sets: to judge by, not to learn from.
    tracklet: int64 [B], numbered over all sets.
    camera: int64 [B].
    frame: int64 [B], the picture's place in its tracklet.
    index: int64 [B], the sample's position in its dataset.
    """

    image: Tensor
    label: Tensor
    identity: Tensor
    tracklet: Tensor
    camera: Tensor
    frame: Tensor
    index: Tensor


class ReadingBatch(TypedDict):
    """Pictures of words with their letters.

    image: float32 [B, C, H, W], standardised as in `ImageBatch`.
    characters: int64 [B, T], 1 + the place of a letter in the alphabet, and 0 behind a word's end.
    index: int64 [B], the sample's position in its dataset.
    """

    image: Tensor
    characters: Tensor
    index: Tensor


class WordBatch(ReadingBatch):
    """Rendered pictures of printed words, see `lightspan.datamodules.rendered.words`.

    image: float32 [B, C, H, W], standardised as in `ImageBatch`.
    characters: int64 [B, T], 1 to 26 for the letters of the word, and 0 behind its end.
    index: int64 [B], the sample's position in its dataset.
    ink: int64 [B, H, W], 1 where letters cover at least half of a pixel.
    label: int64 [B], the word's place in the vocabulary of its set.
    """

    ink: Tensor
    label: Tensor


class SpelledWordBatch(WordBatch):
    """A `WordBatch` whose words also stand in a sentence.

    image: float32 [B, C, H, W].
    characters: int64 [B, T].
    index: int64 [B].
    ink: int64 [B, H, W].
    label: int64 [B].
    tokens: int64 [B, P], of the sentence with its special tokens.
    mask: int64 [B, P], 1 where a token is the sentence's own and 0 on padding, which is at the end.
    """

    tokens: Tensor
    mask: Tensor


class SpellingBatch(TypedDict):
    """Words without a picture, each in a sentence.

    characters: int64 [B, T], 1 + the place of a letter in the alphabet, and 0 behind a word's end.
    tokens: int64 [B, P], of the sentence with its special tokens.
    mask: int64 [B, P], 1 where a token is the sentence's own and 0 on padding, which is at the end.
    index: int64 [B], the word's position in its list.
    """

    characters: Tensor
    tokens: Tensor
    mask: Tensor
    index: Tensor


class MultispectralBatch(TypedDict):
    """Pictures of any number of bands, as satellites take them.

    image: float32 [B, C, H, W], reflectance standardised per band to about zero mean and unit variance; 0, a band's
        mean, where a pixel is not valid.
    valid: int64 [B, C, H, W], 0 where a band was not seen there: nodata, a cloud, a band that is absent. A method takes
        nothing from such a pixel to learn from.
    label: int64 [B], each in [0, num_classes); 0 where nothing is known.
    index: int64 [B], the sample's position in its dataset.
    """

    image: Tensor
    valid: Tensor
    label: Tensor
    index: Tensor


class MultispectralSeriesBatch(TypedDict):
    """Pictures of one place at several dates. The third axis of `image` and `valid` is that of the T dates.

    image: float32 [B, C, T, H, W], as in `MultispectralBatch`.
    valid: int64 [B, C, T, H, W], as there.
    label: int64 [B].
    index: int64 [B].
    """

    image: Tensor
    valid: Tensor
    label: Tensor
    index: Tensor


class LandBatch(MultispectralBatch):
    """Rendered scenes of land, see `lightspan.datamodules.rendered.land`.

    image: float32 [B, C, H, W].
    valid: int64 [B, C, H, W].
    label: int64 [B], the material of most of the land cover.
    index: int64 [B].
    cover: int64 [B, H, W], the land cover of each pixel, a place in `MATERIALS`.
    tags: int64 [B, G], 1 for each of `MATERIALS` that covers a part of the scene.
    tags_known: int64 [B, G], 1 throughout.
    day: float32 [B], of the year, in [0, 365).
    """

    cover: Tensor
    tags: Tensor
    tags_known: Tensor
    day: Tensor


class LandSeriesBatch(MultispectralSeriesBatch):
    """Rendered series of scenes of land, see `lightspan.datamodules.rendered.land`.

    image: float32 [B, C, T, H, W].
    valid: int64 [B, C, T, H, W], 0 under clouds.
    label: int64 [B], the material of most of the land cover.
    index: int64 [B].
    clear: float32 [B, C, T, H, W], the image without clouds: to judge by, not to learn from.
    cover: int64 [B, H, W], the land cover of each pixel, a place in `MATERIALS`.
    tags: int64 [B, G], 1 for each of `MATERIALS` that covers a part of the scene.
    tags_known: int64 [B, G], 1 throughout.
    day: float32 [B, T], of the year, ascending, in [0, 365).
    """

    clear: Tensor
    cover: Tensor
    tags: Tensor
    tags_known: Tensor
    day: Tensor


class SeasonsBatch(TypedDict):
    """Places in two seasons each, with tags: a `TaggedViewsBatch` of any bands, whose views are crops of either season.

    views: V tensors, float32 [B, C, H, W], as the image of a `MultispectralBatch`; V is 2.
    tags: int64 [B, G], 1 for each tag that holds.
    tags_known: int64 [B, G], 0 where it is not known whether a tag holds.
    index: int64 [B].
    """

    views: list[Tensor]
    tags: Tensor
    tags_known: Tensor
    index: Tensor


class SliceBatch(TypedDict):
    """Rendered slices through bodies, see `lightspan.datamodules.rendered.slices`.

    image: float32 [B, C, H, W], standardised as in `ImageBatch`; C is 1.
    organs: int64 [B, H, W], 0 outside of the patient, else 1 + a place in `ANATOMY`.
    lesion: int64 [B, H, W], 1 where a lesion is.
    label: int64 [B], the kind of the lesion that the slice shows, 0 without one.
    radius: float32 [B], of that lesion, in pixels; 0 without one.
    patient: int64 [B], numbered over all sets.
    index: int64 [B], the sample's position in its dataset.
    """

    image: Tensor
    organs: Tensor
    lesion: Tensor
    label: Tensor
    radius: Tensor
    patient: Tensor
    index: Tensor


class TableBatch(TypedDict):
    """Rows of a table, with a number to predict from each.

    table: float32 [B, F], columns standardised as those of the training rows, 0 where a value is missing.
    target: float32 [B], in the unit that the data module names.
    index: int64 [B], the row's position in its dataset.
    """

    table: Tensor
    target: Tensor
    index: Tensor


class LabelledTableBatch(TypedDict):
    """Rows of a table, with the class of each.

    table: float32 [B, F], standardised as in a TableBatch.
    label: int64 [B]; all 0 where the data have none.
    index: int64 [B].
    """

    table: Tensor
    label: Tensor
    index: Tensor


class TableViewsBatch(TypedDict):
    """Several views of each row of a table. Row i of every view comes from the same row.

    views: V tensors, float32 [B, F].
    target: float32 [B].
    index: int64 [B].
    """

    views: list[Tensor]
    target: Tensor
    index: Tensor


class LabelledTableViewsBatch(TypedDict):
    """Several views of each row of a table, as in a TableViewsBatch, with the class of each.

    views: V tensors, float32 [B, F].
    label: int64 [B]; all 0 where the data have none.
    index: int64 [B].
    """

    views: list[Tensor]
    label: Tensor
    index: Tensor
