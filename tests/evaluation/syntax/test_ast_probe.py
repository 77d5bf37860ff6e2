"""AST-Probe: its loss and its features by hand, trees that can be read and trees that cannot, and what is refused."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightspan.core.errors import UserError
from lightspan.core.generators import drawn_from
from lightspan.evaluation.features.store import FeatureStore
from lightspan.evaluation.syntax.ast_probe import (
    RIGHT,
    UNKNOWN,
    ASTProbe,
    SyntaxProbe,
    TreeBatch,
    probe_loss,
    rank_hinge,
)
from lightspan.evaluation.syntax.code_features import (
    DRAWN,
    CodeFeatures,
    EncodedCode,
    drawn_anew,
    hidden_states,
    tokenized,
    word_means,
)
from lightspan.evaluation.syntax.python_trees import parsed, python_functions
from lightspan.evaluation.syntax.trees import encode


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    with drawn_from(7):
        return LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=128, **sizes))


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters | {"<s>": 256, "</s>": 257}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def known(count: int = 40, noise: float = 0.0) -> CodeFeatures:
    """Features from which heights and labels can be read as the probe reads them, and random ones."""
    trees = [one.tree for one in python_functions(most=count, words=24).found]
    encoded = [encode(tree) for tree in trees]
    names = (
        sorted({label for each in encoded for label in each.c}),
        sorted({label for each in encoded for label in each.u}),
    )
    rows = []
    for each in encoded:
        # Steps whose squared lengths are the heights, in the direction of their label.
        steps = torch.zeros(len(each.d), len(names[0]))
        for i, (height, label) in enumerate(zip(each.d, each.c, strict=True)):
            steps[i, names[0].index(label)] = height**0.5
        walked = torch.cat([torch.zeros(1, len(names[0])), steps.cumsum(dim=0)])
        unary = torch.nn.functional.one_hot(torch.tensor([names[1].index(label) for label in each.u]), len(names[1]))
        rows.append(torch.cat([walked, unary], dim=1))
    x = torch.cat(rows)
    return CodeFeatures(tuple(trees), {2: x + noise * drawn(*x.shape)}, {"random": {2: drawn(*x.shape)}})


def test_the_hinge_is_its_sum_over_pairs_and_sees_only_the_order() -> None:
    guess, d = drawn(3, 6), drawn(3, 6, seed=1).mul(2).round()
    valid = torch.arange(6) < torch.tensor([[6], [3], [1]])
    pairs = [
        max(0.0, 1 - float(guess[b, i] - guess[b, j]))
        for b in range(3)
        for i in range(6)
        for j in range(6)
        if valid[b, i] and valid[b, j] and d[b, i] > d[b, j]
    ]
    assert float(rank_hinge(guess, d, valid)) == pytest.approx(sum(pairs) / len(pairs))
    assert torch.equal(rank_hinge(guess, d.exp(), valid), rank_hinge(guess, d, valid))
    order = d.argsort(dim=1).argsort(dim=1).float()
    assert float(rank_hinge(order, order, valid)) == 0
    assert float(rank_hinge(guess, torch.ones(3, 6), valid)) == 0
    assert float(rank_hinge(guess[:, :0], d[:, :0], valid[:, :0])) == 0


def test_the_loss_is_the_sum_of_the_papers_four_terms() -> None:
    probe, x = SyntaxProbe(5, 3, 4, 2), drawn(2, 4, 5)
    d, c, u = drawn(2, 3, seed=1), torch.tensor([[0, 3, UNKNOWN]] * 2), torch.tensor([[1, 0, 1, UNKNOWN]] * 2)
    word = torch.tensor([[True] * 4, [True, True, True, False]])
    probe.basis_DM.data = drawn(5, 3, seed=2)
    assert all(0.04 < float(part.abs().max()) <= 0.05 for part in SyntaxProbe(50, 50, 50, 50).parameters())
    with torch.no_grad():
        z = x @ probe.basis_DM
        gap = z[:, 1:] - z[:, :-1]
        labels = -torch.stack([(gap[:, i] @ probe.labels_MC).log_softmax(1)[:, c[0, i]] for i in range(2)]).mean()
        unary = -torch.stack([(z[:, i] @ probe.unary_MU).log_softmax(1)[:, u[0, i]] for i in range(3)]).mean()
        off = (probe.basis_DM.T @ probe.basis_DM - torch.eye(3)).square().sum()
        expected = rank_hinge(gap.square().sum(2), d, word[:, 1:]) + labels + unary + 7 * off
        torch.testing.assert_close(probe_loss(probe, TreeBatch(x, d, c, u, word), 7.0), expected)


def test_heights_do_not_change_when_an_orthonormal_basis_turns() -> None:
    probe, x = SyntaxProbe(5, 5, 2, 2), drawn(2, 4, 5)
    found = []
    for seed in (2, 3):
        probe.basis_DM.data = torch.linalg.qr(drawn(5, 5, seed=seed)).Q
        assert float(probe.orthogonality().detach()) < 1e-10
        found.append(probe(x)[0].detach())
    torch.testing.assert_close(*found)
    torch.testing.assert_close(found[0], (x[:, 1:] - x[:, :-1]).square().sum(dim=-1))
    with pytest.raises(UserError, match="SyntaxProbe"):
        SyntaxProbe(0, 1, 1, 1)


def test_trees_are_read_from_features_that_have_them_and_not_from_random_ones() -> None:
    found = ASTProbe(epochs=40, rate=1e-2, batch_size=8, patience=20, rate_patience=10).fit(known(80))
    row, control = found.rows
    assert row["f1"] > control["f1"] + 0.2
    assert found.best == 2
    assert found.floors["random"] == control["f1"]
    assert found.gains[1]["gain"] == pytest.approx(row["f1"] - control["f1"])
    assert found.gains[1]["low"] > 0
    assert found.floors[RIGHT] < control["f1"] + 0.2
    assert sum(found.texts) == 80


def test_what_cannot_be_probed_is_refused() -> None:
    code = known(6)
    one_leaf = parsed("pass").tree
    for trees, layers, said in (
        (code.trees, {}, "no layer"),
        (code.trees[:4], {0: code.layers[2]}, "needs 5"),
        ((one_leaf,) * 9, {0: torch.zeros(9, 2)}, "needs 5"),
        (code.trees, {0: code.layers[2][1:]}, "layer 0"),
        (code.trees, {0: code.layers[2] * torch.nan}, "layer 0"),
    ):
        with pytest.raises(UserError, match=said):
            ASTProbe().fit(CodeFeatures(trees, layers))


def test_a_tree_of_one_leaf_among_others_changes_nothing() -> None:
    code = known(8)
    x = torch.cat([drawn(1, code.layers[2].shape[1]), code.layers[2]])
    with_leaf = CodeFeatures((parsed("pass").tree, *code.trees), {2: x})
    alone = CodeFeatures(code.trees, {2: code.layers[2]})
    assert ASTProbe(epochs=2).fit(with_leaf).rows[0]["f1"] == pytest.approx(ASTProbe(epochs=2).fit(alone).rows[0]["f1"])


def test_tokens_of_a_word_are_told_from_space_and_special_ones() -> None:
    one = parsed("if  ab:\n  é")
    plain = tokenized(one, byte_tokenizer())
    assert plain is not None
    assert plain.words == [0, 0, -1, -1, 1, 1, 2, -1, -1, -1, 3, 3]
    causal, masked = (tokenized(one, byte_tokenizer(**special)) for special in (
        {"bos_token": "<s>"}, {"cls_token": "<s>", "sep_token": "</s>"},
    ))  # fmt: skip
    assert causal is not None
    assert causal == ([256, *plain.ids], [-1, *plain.words])
    assert masked == ([256, *plain.ids, 257], [-1, *plain.words, -1])


def test_words_are_means_of_their_tokens_and_padding_changes_nothing() -> None:
    states = drawn(2, 5, 3)
    x = word_means(states, [-1, 0, 0, 1])
    torch.testing.assert_close(x, torch.stack([states[:, 1:3].mean(dim=1), states[:, 3]]))
    for network in (llama(), BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=2))):
        network.eval()
        layers, device = [0, 1, 2], torch.device("cpu")
        short, long = [3, 4, 5], [7, 8, 9, 10, 11]
        both = hidden_states(network, [short, long], layers, device)
        torch.testing.assert_close(both[0, :, :3], hidden_states(network, [short], layers, device)[0])
    states = network(torch.tensor([long]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(both[1], torch.stack(states)[:, 0])


def test_the_control_keeps_embeddings_and_draws_blocks_anew() -> None:
    network = llama()
    first, again, other = (drawn_anew(network, seed).state_dict() for seed in (0, 0, 1))
    for name, before in network.state_dict().items():
        assert torch.equal(first[name], again[name])
        if ".layers." not in name:
            assert torch.equal(first[name], before), name
        elif "proj" in name:
            assert not torch.equal(first[name], before), name
            assert not torch.equal(first[name], other[name]), name
    for seed in range(2):  # of what was drawn from the same seed: not itself again
        same = drawn_anew(drawn_anew(network, seed), seed).state_dict()
        assert any(not torch.equal(same[name], (first, other)[seed][name]) for name in same)
    with pytest.raises(UserError, match="no config"):
        drawn_anew(torch.nn.Linear(2, 2), 0)


def test_code_is_encoded_once_and_probed(tmp_path: Path) -> None:
    network, store = llama(), FeatureStore(tmp_path)
    code = EncodedCode(network, byte_tokenizer(bos_token="<s>"), functions=12, words=20, layers=[0, 3], batch_size=5)
    assert code.outlook(store).endswith("to be computed")
    found = code.load(store)
    assert code.outlook(store).endswith("in the store")
    words = sum(len(tree.words()) for tree in found.trees)
    assert {layer: list(x.shape) for layer, x in found.layers.items()} == {0: [words, 8], 3: [words, 8]}
    assert found.controls[DRAWN].keys() == {3}
    assert not torch.equal(found.controls[DRAWN][3], found.layers[3])
    assert network.training
    result = ASTProbe(epochs=1).fit(found)
    assert [(row["network"], row["layer"]) for row in result.rows] == [("", 0), ("", 3), (DRAWN, 3)]


def test_what_is_left_out_on_the_way_to_the_trees_is_a_figure(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.py").write_text(f"def f{i}(a):\n    return a + {i}\n")
    (tmp_path / "old.py").write_text("print 'two'\n")
    (tmp_path / "long.py").write_text("def g(" + "a" * 200 + "):\n    return 1\n")
    code = EncodedCode(llama(), byte_tokenizer(), folder=str(tmp_path), layers=[0])
    store = FeatureStore(tmp_path / "store")
    assert "1 of 8 files (no Python of this version)" in code.outlook(store)
    found = code.load(store)
    assert [(one.what, one.number, one.of) for one in found.left_out] == [
        ("files", 1, 8),
        ("functions to encode", 1, 7),
    ]
    probe = ASTProbe(epochs=1)
    said = {figure.name: figure.value for figure in probe.fit(found).figures() if "left out" in figure.name}
    assert said["left out of 8 files, no Python of this version"] == 1
    assert len(said) == 2
    table = probe.fit(found).table()
    assert {row["floor"] for row in table} == {probe.fit(found).floors[RIGHT]}


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    network, tokenizer = llama(), byte_tokenizer()
    for wrong, said in (
        ({"layers": [4]}, "layers="), ({"layers": [-1]}, "layers="), ({"layers": []}, "layers="),
        ({"words": 1}, "words="), ({"words": 257}, "words="), ({"functions": 0}, "functions="),
        ({"per_file": 0}, "per_file="), ({"batch_size": 0}, "batch_size="), ({"seed": -1}, "seed="),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            EncodedCode(network, tokenizer, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="list of equal blocks"):
        EncodedCode(torch.nn.Linear(2, 2), tokenizer)
    (tmp_path / "long.py").write_text("def f(" + "a" * 200 + "):\n    return 1\n")
    with pytest.raises(UserError, match="at most 128 tokens"):
        EncodedCode(network, tokenizer, folder=str(tmp_path)).load(FeatureStore(tmp_path / "store"))
