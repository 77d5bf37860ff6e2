"""Conversations: what is learned of them, how they are cut and packed, and which lines are refused or left out."""

import functools
import json
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lightspan.backbones.language import llama
from lightspan.backbones.tokenizers import HashedWords
from lightspan.backbones.trained_tokenizers import trained_tokenizer
from lightspan.core.errors import UserError
from lightspan.datamodules.text.chat import Chat, Conversation, Renderer, row_of
from lightspan.methods.language.causal_lm import CausalLM
from lightspan.nn.sequences.texts import places_of

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think>{% endif %}"
    "{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerBase:
    """Pairs of bytes, with <pad>, <start>, <end> and <mask>; texts begin with <start>."""
    made = trained_tokenizer(["what is one and one? two. and two and two? four.", "user assistant system"], 320)
    made.chat_template = template
    return made


def said(*contents: str, system: str | None = None) -> dict[str, Any]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return {"messages": ([] if system is None else [{"role": "system", "content": system}]) + turns}


TURNS = said("what is one and one?", "two.", "and two and two?", "four.", system="count")
PROMPT = {"prompt": "one and one is", "completion": " two."}


def write(folder: Path, rows: list[Any], name: str = "chat.jsonl") -> str:
    path = folder / name
    path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def opened(folder: Path, rows: list[Any], **settings: Any) -> Chat:
    settings = {"tokenizer": tokenizer(), "length": 96, "batch_size": 2, "val_size": 1} | settings
    data = Chat(write(folder, rows), **settings)
    data.setup()
    return data


def learned_text(renderer: Renderer, found: Any) -> tuple[str, str]:
    """(all of it, what is learned of it with a bar where something is skipped), as text."""
    tokens, learned = renderer.tokens(row_of("here", found))
    begins = np.flatnonzero(np.diff(learned.astype(int), prepend=0) == 1)
    spans = [tokens[a : a + np.argmin([*learned[a:], False])] for a in begins]
    decode = renderer.tokenizer.decode
    return decode(tokens), "|".join(decode(span) for span in spans)


def test_the_answers_are_learned_with_their_end_and_nothing_else() -> None:
    whole, learned = learned_text(Renderer(tokenizer()), TURNS)
    assert whole == (
        "<|system|>count<end>\n<|user|>what is one and one?<end>\n<|assistant|>two.<end>\n"
        "<|user|>and two and two?<end>\n<|assistant|>four.<end>\n"
    )
    assert learned == "two.<end>\n|four.<end>\n"
    assert learned_text(Renderer(tokenizer(), "last"), TURNS) == (whole, "four.<end>\n")
    trailing = said("one?", "two.", "more?")
    assert learned_text(Renderer(tokenizer()), trailing)[1] == "two.<end>\n"
    assert learned_text(Renderer(tokenizer(), "last"), trailing)[1] == "two.<end>\n"


def test_a_first_message_of_the_assistant_answers_nothing_and_is_read() -> None:
    opening = {"messages": [{"role": "assistant", "content": "hello."}, *said("one?", "two.")["messages"]]}
    for template, answer in ((CHATML, "two.<end>\n"), (None, " two.<end>")):
        for turns in ("all", "last"):
            whole, learned = learned_text(Renderer(tokenizer(template), turns), opening)
            assert "hello." in whole
            assert learned == answer


def test_tokens_are_those_with_which_the_network_is_asked_later() -> None:
    """As transformers cuts a conversation, the prompt being those before what is learned."""
    tokens, learned = Renderer(tokenizer(), "last").tokens(row_of("here", TURNS))
    theirs = tokenizer().apply_chat_template(TURNS["messages"], return_dict=True)["input_ids"]
    assert tokens.tolist() == theirs
    asked = tokenizer().apply_chat_template(TURNS["messages"][:-1], add_generation_prompt=True, return_dict=True)
    assert tokens[~learned].tolist() == asked["input_ids"]


def test_without_a_template_messages_are_lines_and_a_completion_ends_the_text() -> None:
    renderer = Renderer(tokenizer(None))
    assert learned_text(renderer, said("one?", "two.", system="count")) == (
        "<start>system: count\nuser: one?\nassistant: two.<end>\n",
        " two.<end>",
    )
    for each in (renderer, Renderer(tokenizer())):  # a template is for conversations
        assert learned_text(each, PROMPT) == ("<start>one and one is two.<end>", " two.<end>")
    assert learned_text(renderer, {"prompt": "", "completion": "two."})[1] == "two.<end>"


def test_a_tokenizer_that_does_not_tell_where_tokens_stand_cuts_each_part() -> None:
    words = HashedWords()
    tokens, learned = Renderer(words).tokens(row_of("here", {"prompt": "one two", "completion": "three"}))
    assert tokens.tolist() == words("one two three")["input_ids"]
    assert learned.tolist() == [False, False, False, True, True]


def test_a_template_that_changes_what_was_said_is_refused_unless_the_last_answer_is_all() -> None:
    row = row_of("line 7", TURNS)
    with pytest.raises(UserError, match=r"line 7: .*message 3 differently once others follow.*turns=last"):
        Renderer(tokenizer(THINKING)).parts(row)
    assert learned_text(Renderer(tokenizer(THINKING), "last"), TURNS)[1] == "<think>four.<end>\n"
    assert learned_text(Renderer(tokenizer(THINKING)), said("one?", "two."))[1] == "<think>two.<end>\n"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ messages.__class__.__mro__ }}", "{% for %}"]
)
def test_a_template_that_refuses_or_reaches_out_of_its_sandbox_names_the_line(template: str) -> None:
    with pytest.raises(UserError, match="line 3: the tokenizer's template cannot write this conversation"):
        Renderer(tokenizer(template)).parts(row_of("line 3", TURNS))


def test_a_template_that_makes_a_conversation_very_long_is_refused_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    row, template = row_of("line 3", TURNS), tokenizer("{{ 'a' * 1000 }}")
    assert len(Renderer(template).tokens(row)[0])
    monkeypatch.setenv("LIGHTSPAN_MAX_CHARACTERS", "999")
    with pytest.raises(UserError, match=r"line 3: .*LIGHTSPAN_MAX_CHARACTERS"):
        Renderer(template).tokens(row)


BAD = [
    ("{", "line 1 is not JSON"),
    ([], "line 1 has no conversation"),
    ({"text": "a"}, "line 1 has no conversation"),
    (TURNS | PROMPT, "line 1 has no conversation"),
    ({"prompt": "a"}, "line 1 has no completion"),
    ({"prompt": None, "completion": "a"}, "line 1 has no prompt"),
    ({"messages": []}, "line 1: messages"),
    ({"messages": {"role": "user"}}, "line 1: messages"),
    ({"messages": ["a"]}, "line 1: message 1"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "line 1: message 1 .*tools"),
    ({"messages": [{"role": "user", "content": "a"}]}, "line 1 has no message of the role assistant"),
]


def test_lines_that_are_no_conversations_are_refused_by_number(tmp_path: Path) -> None:
    for line, message in BAD:
        with pytest.raises(UserError, match=message):
            opened(tmp_path, [line, TURNS])
    with pytest.raises(UserError, match="line 5 is not JSON"):
        opened(tmp_path, [TURNS, PROMPT, "{'a'}"])
    with pytest.raises(UserError, match="has no conversation"):
        opened(tmp_path, [])
    with pytest.raises(UserError, match="one to train on and val_size=1 ask for more than the 1 conversations"):
        opened(tmp_path, [TURNS])
    for settings, message in (({"length": 2}, "length=2"), ({"val_size": 0}, "val_size=0")):
        with pytest.raises(UserError, match=message):
            opened(tmp_path, [TURNS], **settings)


def test_rows_without_anything_to_learn_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = write(tmp_path, [PROMPT], "val.jsonl")
    alone = {"messages": [{"role": "assistant", "content": "hello."}]}
    rows = [TURNS, said("one?", " "), {"prompt": "a", "completion": ""}, said("one?" * 99, "two."), said("a<end>", "b")]
    data = opened(tmp_path, [*rows, alone, PROMPT], val_path=val)
    assert len(data.train) == 2  # type: ignore[arg-type]
    said_ = capsys.readouterr().out
    assert "conversations: 2 to train on, 1 to validate on" in said_
    assert "2 with an empty answer skipped" in said_
    assert "2 with nothing to learn in their first 96 tokens skipped" in said_
    assert "1 in which someone says a special token skipped" in said_
    with pytest.raises(UserError, match=r"no conversation to use for training is left; 1 with an empty answer"):
        opened(tmp_path, [rows[1]], val_path=val)


def test_a_long_answer_is_cut_and_rows_are_padded_at_their_end(tmp_path: Path) -> None:
    data = opened(tmp_path, [said("one?", "two. " * 99), PROMPT, TURNS], val_path=write(tmp_path, [PROMPT], "v.jsonl"))
    long, short = data.train.sample(0, 0), data.train.sample(1, 0)  # type: ignore[union-attr]
    assert long["mask"].all()
    assert long["learned"][-1] == 1
    size = int(short["mask"].sum())
    assert short["mask"].tolist() == [1] * size + [0] * (96 - size)
    assert not short["tokens"][size:].any()
    assert not short["learned"][size:].any()


def test_the_training_rows_are_known_by_what_is_learned_of_them_too(tmp_path: Path) -> None:
    of = {turns: opened(tmp_path, [TURNS] * 3, turns=turns).training_content() for turns in ("all", "last")}
    assert of["all"] != of["last"]
    loader = opened(tmp_path, [TURNS, PROMPT] * 4).train_dataloader()
    again = opened(tmp_path, [TURNS, PROMPT] * 4).train_dataloader()
    straight = [batch["index"].tolist() for batch in loader]
    next(iter(loader))
    again.load_state_dict(loader.state_dict())
    assert [batch["index"].tolist() for batch in again] == [batch["index"].tolist() for batch in loader]
    assert len(straight) == 3
    with pytest.raises(UserError, match="content"):
        opened(tmp_path, [TURNS, said("one?", "two.")] * 4).train_dataloader().load_state_dict(loader.state_dict())


def test_places_begin_anew_with_each_text_of_a_row() -> None:
    mask = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 3, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    assert places_of(mask).tolist() == [
        *([0, 1, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    ]


SMALL: dict[str, Any] = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
NETWORKS = {
    "llama": lambda: llama(320, 16, 2, 2, 24, 96),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, num_key_value_heads=1, intermediate_size=24, max_position_embeddings=96)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=96, attn_pdrop=0, embd_pdrop=0)
    ),
}
"""GPT-2 with its cache in use, as transformers makes it."""


def method(network: Any) -> CausalLM:
    return CausalLM(network, optimizer=functools.partial(torch.optim.SGD, lr=0.1)).eval()


def test_packed_and_trimmed_rows_have_the_loss_and_the_gradient_of_those_that_are_not(tmp_path: Path) -> None:
    rows = [said("one?", "two."), PROMPT, said("what is one and one?", "two.", "sure?", "four.")]
    data = opened(tmp_path, rows * 2, val_path=write(tmp_path, [PROMPT], "v.jsonl"), batch_size=6, pack=True, trim=True)
    (batch,) = data.train_dataloader()
    joined = data.joined(batch)
    assert len(joined["tokens"]) < 6
    assert joined["mask"].max() > 1
    assert joined["learned"].sum() == batch["learned"].sum()
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        model = method(make())
        losses, gradients = [], []
        for each in (batch, joined):
            model.zero_grad()
            loss = model.loss(each)
            loss.backward()
            losses.append(loss.detach())
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        torch.testing.assert_close(losses[0], losses[1], msg=name)
        torch.testing.assert_close(gradients[0], gradients[1], msg=name)


def test_only_answers_count_and_only_what_was_said_before_matters(tmp_path: Path) -> None:
    (batch,) = opened(
        tmp_path, [PROMPT, TURNS], batch_size=2, val_path=write(tmp_path, [PROMPT], "v.jsonl")
    ).train_dataloader()
    model = method(NETWORKS["llama"]())
    learned = batch["learned"].bool()
    nats = [
        torch.nn.functional.cross_entropy(
            model.backbone(input_ids=tokens[None]).logits[0, :-1], tokens[1:], reduction="none"
        )[known[1:]]
        for tokens, known in zip(batch["tokens"], learned, strict=True)
    ]
    torch.testing.assert_close(model.loss(batch), torch.cat(nats).mean())
    nothing = model.loss(batch | {"learned": torch.zeros_like(batch["learned"])})
    nothing.backward()
    assert nothing == 0


def test_rows_and_packing_that_a_network_has_no_positions_for_are_refused(tmp_path: Path) -> None:
    class Trainer:
        datamodule: Any = None

    def setup(network: Any, **settings: Any) -> None:
        model = method(network)
        model._trainer = trainer = Trainer()  # type: ignore[assignment]
        trainer.datamodule = Chat("x", tokenizer(), **settings)
        model.setup("validate")

    setup(NETWORKS["llama"](), length=96, pack=True)
    with pytest.raises(UserError, match=r"length=97 tokens are more than the 96 positions of LlamaForCausalLM"):
        setup(NETWORKS["llama"](), length=97)
    with pytest.raises(UserError, match=r"BloomForCausalLM takes no positions.*pack=false"):
        setup(BloomForCausalLM(BloomConfig(**SMALL, n_head=2)), length=96, pack=True)


def test_a_row_has_its_place_for_messages() -> None:
    assert row_of("here", PROMPT) == Conversation("here", (), ("one and one is", " two."))


def test_where_the_file_is_not_here_a_plan_has_full_rows(tmp_path: Path) -> None:
    batch = Chat(str(tmp_path / "none"), tokenizer(), length=8).stand_in()
    assert batch is not None
    assert batch["mask"].tolist() == [[1] * 8] * 2
    assert batch["learned"].sum() == 2 * 8
    assert opened(tmp_path, [TURNS, PROMPT]).stand_in() is None


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_templates_without_end_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSPAN_MAX_SECONDS", "1")
    row = row_of("line 1", TURNS)
    before = (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF))
    for template, message in {
        ENDLESS: "runs for more than 1 seconds.*LIGHTSPAN_MAX_SECONDS",
        "{{ 'a' * 10 ** 12 }}": "needs more than .* bytes.*LIGHTSPAN_MAX_BYTES",
    }.items():
        with pytest.raises(UserError, match=f"line 1.*{message}"):
            Renderer(tokenizer(template)).tokens(row)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGPROF)) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    Renderer(tokenizer()).tokens(row)
