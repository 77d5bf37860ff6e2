"""Folders as transformers writes them: read as settings and tensors, never followed elsewhere, never run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from lightspan.backbones.attended import FeatureMaps
from lightspan.backbones.dense import PyramidMaps
from lightspan.backbones.language import bert, stored_bert, stored_t5, t5
from lightspan.backbones.tokenizers import stored_tokenizer
from lightspan.backbones.vision import timm_backbone
from lightspan.errors import UserError

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
    for network, stored in ((t5(**SIZES), stored_t5), (bert(**SIZES), stored_bert)):
        again = stored(str(saved(network, tmp_path / stored.__name__)))
        assert again.training
        assert equal(network, again)


def test_an_encoder_comes_out_of_the_model_that_it_was_pretrained_in(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    whole = BertForMaskedLM(BertConfig(vocab_size=40, **small)).half()
    encoder = stored_bert(str(saved(whole, tmp_path / "whole")))
    assert encoder.dtype == torch.float16
    assert torch.equal(encoder.embeddings.word_embeddings.weight, whole.bert.embeddings.word_embeddings.weight)


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


@pytest.mark.parametrize("stored", [stored_t5, stored_bert])
def test_an_index_does_not_lead_out_of_its_folder(stored: Callable[[str], Any], tmp_path: Path) -> None:
    saved(t5(**SIZES), tmp_path / "other")
    folder = saved(t5(**SIZES), tmp_path / "t5")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"shared.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json names '\.\./other"):
        stored(str(folder))


def test_settings_that_are_none_and_folders_without_weights_are_refused(tmp_path: Path) -> None:
    folder = saved(bert(**SIZES), tmp_path / "bert")
    for text in ("[1]", "[" * 100_000, "{", ""):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match="has no BERT that transformers can read"):
            stored_bert(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors files"):
        stored_bert(str(folder))
    with pytest.raises(UserError, match="there is no BERT in"):
        stored_bert(str(tmp_path / "absent"))


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
