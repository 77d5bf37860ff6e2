"""A folder of transformers, fine-tuned on a file of conversations and handed on, as docs/fine-tuning.md does it."""

import json
from pathlib import Path
from typing import Any

import pytest
import rank_processes
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lightspan.adapters.inject import adapt, fold
from lightspan.adapters.lora import LoRA
from lightspan.adapters.peft import load_peft, save_peft
from lightspan.adapters.svfit import SVFit
from lightspan.backbones.language import stored_causal_lm
from lightspan.backbones.trained_tokenizers import trained_tokenizer
from lightspan.cli.main import main

SHORT = [
    *("trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.logger.tensorboard=null"),
    *("data.init_args.batch_size=4", "data.init_args.length=64", "data.init_args.val_size=2"),
    "trainer.callbacks.adaptation.init_args.spec.init_args.rank=2",
]
WORDS = torch.arange(24).view(2, 12)


def folder_of(network: PreTrainedModel, folder: Path) -> Path:
    """A network with a tokenizer that has a template, as transformers saves them."""
    network.save_pretrained(folder)
    tokenizer = trained_tokenizer(["what is one and one? two. user assistant"], 300)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def small(tied: bool) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=24, max_position_embeddings=64, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def conversations(path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(12)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))


@torch.no_grad()
def logits(network: Any) -> torch.Tensor:
    return network.float().eval()(input_ids=WORDS).logits


@pytest.mark.runs
def test_the_three_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    folder_of(small(tied=True), Path("model"))
    conversations(Path("chat.jsonl"))
    assert main(["check", "adaptation/lora_chat"]) == 0
    assert main(["plan", "adaptation/lora_chat", *SHORT]) == 0
    assert main(["fit", "adaptation/lora_chat", "--run", "runs/chat", *SHORT]) == 0
    assert "last.ckpt --to peft" in capsys.readouterr().out
    for form in ("peft", "huggingface"):
        assert main(["export", "runs/chat", "--to", form]) == 0, capsys.readouterr().err
        assert "pipeline_tag: text-generation" in Path(f"runs/chat/export/{form}/README.md").read_text()
    before, merged = stored_causal_lm("model"), stored_causal_lm("runs/chat/export/huggingface")
    adapted = stored_causal_lm("model")
    load_peft(adapted, "runs/chat/export/peft", show=False)
    assert not torch.equal(logits(before), logits(merged))
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=0, atol=2e-3)  # merged in bfloat16
    theirs = AutoModelForCausalLM.from_pretrained("runs/chat/export/huggingface", trust_remote_code=False)
    assert torch.equal(logits(theirs), logits(merged))
    # The folder names its base and its task, so PEFT opens it by itself.
    alone = peft.AutoPeftModelForCausalLM.from_pretrained("runs/chat/export/peft")
    assert torch.equal(logits(alone), logits(adapted))


@pytest.mark.parametrize("spec", [LoRA(rank=2), SVFit()], ids=lambda spec: type(spec).__name__)
def test_adapters_of_stored_networks_come_back_as_peft_and_merged(spec: Any, tmp_path: Path) -> None:
    networks = {
        "llama": (small(tied=False), ["*q_proj", "*v_proj"]),
        "gpt2": (GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)), ["*.c_attn"]),
    }
    for name, (network, match) in networks.items():
        torch.manual_seed(0)
        folder = str(folder_of(network, tmp_path / name))
        tuned = stored_causal_lm(folder)
        adapt(tuned, match, spec, show=False)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        save_peft(tuned, tmp_path / f"{name}-peft")
        again = stored_causal_lm(folder)
        load_peft(again, tmp_path / f"{name}-peft", show=False)
        torch.testing.assert_close(logits(again), logits(tuned))
        fold(tuned)
        tuned.save_pretrained(tmp_path / f"{name}-merged")
        torch.testing.assert_close(logits(stored_causal_lm(str(tmp_path / f"{name}-merged"))), logits(tuned))


@pytest.mark.ranks
def test_two_ranks_under_fsdp2_learn_what_one_process_learns(tmp_path: Path) -> None:
    """With the recipe's frozen weights in bfloat16 beside adapters in float32."""
    torch.manual_seed(0)
    folder_of(small(tied=True), tmp_path / "model")
    conversations(tmp_path / "chat.jsonl")
    figures = {}
    for ranks, overlay in ((1, []), (2, ["-c", "scale/fsdp2", "trainer.devices=2"])):
        run = tmp_path / f"run-{ranks}"
        arguments = ["fit", "adaptation/lora_chat", "--run", str(run), *overlay, *SHORT]
        ended = rank_processes.launch(arguments, ranks, tmp_path / f"said-{ranks}", cwd=tmp_path)
        assert ended.statuses == [0] * ranks, ended.said
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        figures[ranks] = [line["val/loss_nats"] for line in lines if "val/loss_nats" in line]
    assert figures[1]
    assert figures[2] == pytest.approx(figures[1], rel=1e-3)  # products in bfloat16


def test_adapters_are_counted_on_shapes_alone_where_everything_is_made_there() -> None:
    for spec in (LoRA(rank=2), SVFit()):
        with torch.device("meta"):
            outline = small(tied=True)
            counted = adapt(outline, ["*q_proj"], spec, show=False)
        made = adapt(small(tied=True), ["*q_proj"], spec, show=False)
        assert all(parameter.is_meta for parameter in outline.parameters())
        assert counted.rows == made.rows
