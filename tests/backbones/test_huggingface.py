"""Folders as transformers writes them: read as settings and tensors, never followed elsewhere, never run."""

import base64
import json
import os
import re
import struct
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, normalizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from lightspan.backbones import huggingface
from lightspan.backbones.attended import FeatureMaps
from lightspan.backbones.clip import stored_clip
from lightspan.backbones.dense import PyramidMaps
from lightspan.backbones.language import bert, llama, stored_causal_lm, stored_encoder, stored_t5, t5
from lightspan.backbones.tokenizers import stored_tokenizer
from lightspan.backbones.vision import timm_backbone
from lightspan.core.errors import UserError
from lightspan.core.files.foreign import VOCABULARY_BYTES

SIZES = {"vocab_size": 40, "width": 16, "depth": 2, "heads": 2, "mlp_width": 32}


def saved(network: PreTrainedModel, folder: Path, **said: Any) -> Path:
    """A folder with the network, and with these entries in its config.json."""
    network.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))
    return folder


def equal(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    for network, stored in ((t5(**SIZES), stored_t5), (bert(**SIZES), stored_encoder)):
        again = stored(str(saved(network, tmp_path / stored.__name__)))
        assert again.training
        assert equal(network, again)


def test_an_encoder_comes_out_of_the_model_that_it_was_pretrained_in(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    whole = BertForMaskedLM(BertConfig(vocab_size=40, **small)).half()
    folder = str(saved(whole, tmp_path / "whole"))
    encoder = stored_encoder(folder, dtype=None)
    assert encoder.dtype == torch.float16
    assert torch.equal(encoder.embeddings.word_embeddings.weight, whole.bert.embeddings.word_embeddings.weight)
    assert stored_encoder(folder).dtype == torch.float32  # half precision would lose small steps of training


@pytest.mark.parametrize(
    "said",
    [
        {"attn_implementation": "stranger/kernel:evil", "_attn_implementation": "stranger/kernel"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"transformers_weights": "../other/model.safetensors"},
        {"fusion_config": {"x": True}, "auto_map": {"AutoModel": "evil.Evil"}},
    ],
    ids=lambda said: next(iter(said)),
)
def test_settings_that_lead_to_code_or_to_other_files_are_not_followed(said: dict[str, Any], tmp_path: Path) -> None:
    network = t5(**SIZES)
    folder = saved(network, tmp_path / "t5", **said)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}')
    (folder / "custom_generate").mkdir()
    for code in (folder / "evil.py", folder / "custom_generate" / "generate.py"):
        code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert equal(network, stored_t5(str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "said",
    [
        {"num_layers": 10**6},
        {"num_decoder_layers": -1},
        {"d_ff": 10**9},
        {"vocab_size": 10**30},
        {"num_layers": "two"},
        {"num_layers": 3},
    ],
    ids=str,
)
def test_settings_of_another_network_than_the_stored_one_are_refused(said: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no (whole )?T5"):
        stored_t5(str(saved(t5(**SIZES), tmp_path / "t5", **said)))


@pytest.mark.parametrize(("stored", "make"), [(stored_t5, t5), (stored_encoder, bert), (stored_causal_lm, llama)])
def test_an_index_does_not_lead_out_of_its_folder(stored: Any, make: Any, tmp_path: Path) -> None:
    saved(make(**SIZES), tmp_path / "other")
    folder = saved(make(**SIZES), tmp_path / "own")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"shared.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json names '\.\./other"):
        stored(str(folder))


def test_settings_that_are_none_and_folders_without_weights_are_refused(tmp_path: Path) -> None:
    folder = saved(bert(**SIZES), tmp_path / "bert")
    config = (folder / "config.json").read_text()
    for text in ("[1]", "[" * 100_000, "{", ""):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match="has no text encoder that transformers can read"):
            stored_encoder(str(folder))
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors files"):
        stored_encoder(str(folder))
    with pytest.raises(UserError, match="there is no text encoder in"):
        stored_encoder(str(tmp_path / "absent"))


@pytest.mark.parametrize("place", ["evil.Evil", "stranger/repository--evil.Evil"])
def test_a_tokenizers_code_does_not_run_even_if_the_terminal_agrees(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "config.json").write_text('{"model_type": "nosuch"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [place, place]}}))
    with pytest.raises(UserError, match="has no tokenizer that transformers can read"):
        stored_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    for content in (b"{}", b"[" * 100_000, b"\xff", b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match="has no tokenizer that transformers can read"):
            stored_tokenizer(str(tmp_path))
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="named pipe"):
        stored_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", [timm_backbone, FeatureMaps, PyramidMaps])
def test_the_name_of_a_timm_network_is_no_address(kind: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("timm was asked"))
    for name in ("hf-hub:stranger/model", "hf_hub:a/b", "local-dir:/tmp", "resnet18.nosuch", "resnet18/x", ""):
        with pytest.raises(UserError, match="timm has no network named"):
            kind(name)


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CAUSAL: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=40, **SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=40, tie_word_embeddings=True, **SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=40, **SMALL)),
}
"""Small networks of several kinds; of the last a config says is_decoder=False, as of a BERT."""
WORDS = torch.arange(12).view(2, 6)


@torch.no_grad()
def test_a_folder_is_opened_by_what_its_settings_say_it_is(tmp_path: Path) -> None:
    for name, make in CAUSAL.items():
        network = make()
        folder = saved(network, tmp_path / name)
        again = stored_causal_lm(str(folder))
        assert type(again) is type(network)
        assert again.training
        assert not again.config.use_cache
        assert equal(network, again)
        shared = network.get_output_embeddings().weight is network.get_input_embeddings().weight
        assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == shared
        theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
        assert torch.equal(again.eval()(input_ids=WORDS).logits, theirs(input_ids=WORDS).logits)
        assert type(stored_encoder(str(folder))) is type(network.base_model)
    roberta = RobertaModel(RobertaConfig(vocab_size=40, **SMALL), add_pooling_layer=True)
    again = stored_encoder(str(saved(roberta, tmp_path / "roberta")))
    assert again.pooler is None
    assert again.state_dict().keys() == {key for key in roberta.state_dict() if not key.startswith("pooler")}


@torch.no_grad()
def test_settings_of_an_older_transformers_become_those_of_today(tmp_path: Path) -> None:
    """Transformers 4 wrote rope_theta beside the other settings; left out, positions would turn by other angles."""
    network = CAUSAL["llama"]()
    folder = saved(network, tmp_path / "llama", rope_theta=100.0, rope_scaling={"type": "linear", "factor": 2.0})
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    ours = stored_causal_lm(str(folder)).eval()
    assert ours.config.rope_parameters["rope_theta"] == 100
    assert torch.equal(ours(input_ids=WORDS).logits, theirs(input_ids=WORDS).logits)
    assert not torch.allclose(ours(input_ids=WORDS).logits, network.eval()(input_ids=WORDS).logits)


def test_a_trunk_saved_without_its_head_gets_the_tied_one_or_is_refused(tmp_path: Path) -> None:
    network = CAUSAL["gpt2"]()
    again = stored_causal_lm(str(saved(network.transformer, tmp_path / "gpt2")))  # as gpt2's files on the hub are named
    assert equal(network, again)
    with pytest.raises(UserError, match=r"has no whole causal language model.*lm_head\.weight"):
        stored_causal_lm(str(saved(LlamaModel(LlamaConfig(vocab_size=40, **SMALL)), tmp_path / "llama")))


def test_networks_that_are_no_causal_language_model_are_refused_by_what_they_are(tmp_path: Path) -> None:
    cases = {
        "bert": (bert(**SIZES), {}, "whose tokens see those after them"),
        "t5": (t5(**SIZES), {}, "model_type='t5'"),
        "own": (
            llama(40, 16, 1, 2, 24, 16),
            {"model_type": "stranger", "auto_map": {"AutoModel": "e.E"}},
            "'stranger'",
        ),
        "list": (llama(40, 16, 1, 2, 24, 16), {"model_type": ["llama"]}, "model_type="),
        "pictures": (llama(40, 16, 1, 2, 24, 16), {"model_type": "vit"}, "'vit'"),
        "both": (llama(40, 16, 1, 2, 24, 16), {"model_type": "gemma3"}, "reads text alone"),
    }
    for name, (network, said, message) in cases.items():
        with pytest.raises(UserError, match=message):
            stored_causal_lm(str(saved(network, tmp_path / name, **said)))


def test_on_the_meta_device_a_stored_network_has_shapes_and_no_numbers(tmp_path: Path) -> None:
    folder = str(saved(CAUSAL["qwen2"]().half(), tmp_path / "qwen2"))
    for dtype in (None, "bfloat16"):
        with torch.device("meta"):
            outline = stored_causal_lm(folder, dtype)
        whole = stored_causal_lm(folder, dtype)
        assert all(tensor.is_meta for tensor in outline.parameters())
        for name, tensor in whole.state_dict().items():
            assert (outline.state_dict()[name].shape, outline.state_dict()[name].dtype) == (tensor.shape, tensor.dtype)


def test_training_does_not_write_into_the_folder(tmp_path: Path) -> None:
    """The weights are the file's own pages, which several processes share until they change them."""
    folder = saved(CAUSAL["llama"](), tmp_path / "llama")
    before = (folder / "model.safetensors").read_bytes()
    network = stored_causal_lm(str(folder))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_sizes_that_settings_say_cost_nothing_before_the_weights_fit_them(tmp_path: Path) -> None:
    """A config makes a list of all layers and a name for each label, and so did that of a tokenizer's folder."""
    words = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    for name in ("num_labels", "num_hidden_layers"):
        folder = saved(CAUSAL["qwen2"](), tmp_path / name, **{name: 10**9})
        if name == "num_labels":
            stored_causal_lm(str(folder))
        else:
            with pytest.raises(UserError, match="num_hidden_layers=1,000,000,000"):
                stored_causal_lm(str(folder))
        words.save(str(folder / "tokenizer.json"))
        assert stored_tokenizer(str(folder)).get_vocab().items() >= {("a", 0), ("[UNK]", 1)}


def test_parts_of_a_network_have_modest_sizes_too(tmp_path: Path) -> None:
    small = {**SMALL, "projection_dim": 16}
    network = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 9}, vision_config={**small, "image_size": 32}))
    folder = saved(network, tmp_path)
    said = json.loads((folder / "config.json").read_text())
    for layers in (10**9, 999):
        said["text_config"]["num_hidden_layers"] = layers
        (folder / "config.json").write_text(json.dumps(said))
        with pytest.raises(UserError, match=r"num_hidden_layers=1,000,000,000|more than 8 times"):
            stored_clip(str(folder))


def test_a_tokenizer_opens_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    backend = Tokenizer(WordLevel({"secret": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.4.0.json"))
    (tmp_path / "vocab.txt").write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    for said in (
        {"fast_tokenizer_files": ["../tokenizer.4.0.json"]},
        {"tokenizer_class": "BertTokenizer", "vocab": str(tmp_path / "vocab.txt")},
        {"tokenizer_class": "BertTokenizer", "init_inputs": [str(tmp_path / "vocab.txt")]},
        {"tokenizer_class": "PreTrainedTokenizerFast", "gguf_file": "../vocab.txt"},
        {"tokenizer_class": "SiglipTokenizer", "sp_model_kwargs": {"model_file": str(tmp_path / "vocab.txt")}},
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        with pytest.raises(UserError, match=r"tokenizer_config\.json names"):
            stored_tokenizer(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    for setting in ("vocab", "vocab_file"):  # from this file, too, transformers takes any setting
        (folder / "special_tokens_map.json").write_text(json.dumps({setting: str(tmp_path / "vocab.txt")}))
        with pytest.raises(UserError, match=r"special_tokens_map\.json says"):
            stored_tokenizer(str(folder))
    (folder / "special_tokens_map.json").write_text('{"sep_token": "[X]", "additional_special_tokens": ["[Y]"]}')
    assert stored_tokenizer(str(folder)).sep_token == "[X]"


def test_what_lies_beside_a_tokenizer_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setenv(VOCABULARY_BYTES.setting, str((tmp_path / "tokenizer.json").stat().st_size))
    for name in ("train.txt", "trainer_state.json"):
        (tmp_path / name).write_bytes(bytes(10_000))
    for name in ("best.model", "vocab.json.d", "logs.txt", "old_tokenizer.json"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "queue.txt")
    assert len(stored_tokenizer(str(tmp_path))) == 2
    for name in ("vocab.json", "spiece.model", "tokenizer.4.0.json", "bpe.codes"):
        (tmp_path / name).write_bytes(bytes(10_000))
        with pytest.raises(UserError, match=VOCABULARY_BYTES.setting):
            stored_tokenizer(str(tmp_path))
        (tmp_path / name).unlink()


def test_each_vocabulary_that_transformers_reads_has_a_limit() -> None:
    """By the names that its modules declare."""
    declared = re.compile(r"^VOCAB_FILES_NAMES = \{(.*?)\}", re.MULTILINE | re.DOTALL)
    sources = Path(transformers.__file__).parent.rglob("tokenization*.py")
    texts = [found for file in sources for found in declared.findall(file.read_text(encoding="utf-8"))]
    names = {name for text in texts for name in re.findall(r': "([^"]+)"', text)}
    assert {"vocab.json", "merges.txt", "spiece.model"} < names
    assert [name for name in names if not any(fnmatch(name, one) for one in huggingface._TOKENIZER_FILES)] == []


def test_a_vocabulary_that_is_a_pipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    for name in ("vocab.txt", "spiece.model"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match="it is a named pipe"):
            stored_tokenizer(str(tmp_path))
        (tmp_path / name).unlink()


def test_a_tokenizer_that_makes_texts_very_long_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    for times in (4, 40):
        backend.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * times)
        backend.save(str(tmp_path / "tokenizer.json"))
        if times == 4:
            assert len(stored_tokenizer(str(tmp_path)).backend_tokenizer.normalizer.normalize_str("a")) == 2**4
        else:
            with pytest.raises(UserError, match="times as long"):
                stored_tokenizer(str(tmp_path))


def test_maps_of_characters_and_replacements_of_a_decoder_make_no_text_very_long_either(tmp_path: Path) -> None:
    units = [0] * 512  # a trie of the letter a alone, whose text is at 0
    units[0], units[353] = 256 << 10, ord("a") | 1 << 8 | 1 << 10
    charsmap = base64.b64encode(struct.pack("<I512I", 2048, *units) + b"a" * 100 + b"\0").decode()
    mapped = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    replaced = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    backend = json.loads(Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).to_str())
    for times in (1, 2):
        mapping = {"normalizer": {"type": "Sequence", "normalizers": [mapped] * times}}
        decoding = {"decoder": {"type": "Sequence", "decoders": [replaced] * times}}
        for steps in (mapping, decoding):
            (tmp_path / "tokenizer.json").write_text(json.dumps(backend | steps))
            if times == 1:
                made = stored_tokenizer(str(tmp_path)).backend_tokenizer
                long = made.normalizer.normalize_str("a") if steps is mapping else made.decode([0])
                assert long == "a" * 100
            else:
                with pytest.raises(UserError, match="times as long"):
                    stored_tokenizer(str(tmp_path))


def test_a_map_of_characters_counts_whichever_file_has_it(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "texts").write_text("the cat sat on the mat\nb c d e f g\n" * 50)
    for times in (10, 2**13):
        (tmp_path / "rules").write_text(f"61\t{' '.join(['62'] * times)}\n")  # a becomes many b
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "texts"), model_prefix=str(tmp_path / "m"), vocab_size=24, hard_vocab_limit=False,
            normalization_rule_tsv=str(tmp_path / "rules"), minloglevel=2,
        )  # fmt: skip
        folder = tmp_path / str(times)
        folder.mkdir()
        (folder / "spiece.model").write_bytes((tmp_path / "m.model").read_bytes())
        for kind in ("SiglipTokenizer", "T5Tokenizer"):  # run by SentencePiece, and by the library tokenizers
            (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
            if times == 10:
                assert len(stored_tokenizer(str(folder)).tokenize("a")) >= times // 2
            else:
                with pytest.raises(UserError, match="times as long"):
                    stored_tokenizer(str(folder))


def test_a_damaged_map_of_characters_is_no_panic(tmp_path: Path) -> None:
    backend = json.loads(Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).to_str())
    for charsmap in ("", "!!!", base64.b64encode(b"\xff\xff\xff\x7fabc").decode()):
        damaged = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(backend | damaged))
        with pytest.raises(UserError, match="has no tokenizer that transformers can read"):
            stored_tokenizer(str(tmp_path))
