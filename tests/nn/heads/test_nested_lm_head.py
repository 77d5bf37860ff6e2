"""The head of all sizes: a cut state is one with zeros behind, and the whole head is BERT's."""

import torch
from torch.nn import functional as F
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLMPredictionHead

from lightspan.nn.heads.nested_lm_head import NestedLMHead


def test_a_cut_state_has_the_logits_of_the_state_with_zeros_behind() -> None:
    torch.manual_seed(0)
    head, words, x = NestedLMHead(16, 9), torch.randn(9, 16), torch.randn(2, 3, 5)
    torch.testing.assert_close(head(x, words), head(F.pad(x, (0, 11)), words), atol=1e-6, rtol=1e-6)
    assert head.transform(x).shape == (2, 3, 16)


def test_the_whole_head_is_transformers_head_for_masked_words() -> None:
    torch.manual_seed(0)
    theirs = BertLMPredictionHead(BertConfig(vocab_size=9, hidden_size=16))
    ours = NestedLMHead(16, 9)
    for own, other in zip((ours.dense, ours.norm), (theirs.transform.dense, theirs.transform.LayerNorm), strict=True):
        own.load_state_dict(other.state_dict())
    ours.bias = theirs.decoder.bias
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(ours(x, theirs.decoder.weight), theirs(x))
