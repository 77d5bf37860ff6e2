"""ClassMix: which pixels are pasted."""

import torch

from lightspan.nn.class_mix import pasted_pixels

LABEL = torch.tensor([[[0, 0, 1], [2, 2, 1]], [[3, 3, 3], [3, 3, 3]], [[-1, -1, -1], [0, 0, 4]], [[-1] * 3] * 2])


def test_half_of_the_classes_rounded_up_are_pasted_whole() -> None:
    for seed in range(20):
        pasted = pasted_pixels(LABEL, 5, torch.arange(4), seed)
        chosen = [{*label[at].tolist()} for label, at in zip(LABEL, pasted, strict=True)]
        left = [{*label[~at].tolist()} for label, at in zip(LABEL, pasted, strict=True)]
        assert [len(one) for one in chosen] == [2, 1, 1, 0]
        assert not any(one & other for one, other in zip(chosen, left, strict=True))
        assert not any(-1 in one for one in chosen)


def test_every_pair_of_classes_comes_and_the_draw_hangs_on_image_and_seeds_alone() -> None:
    first = [{*LABEL[0][pasted_pixels(LABEL, 5, torch.arange(4), 0, step)[0]].tolist()} for step in range(40)]
    assert {frozenset(one) for one in first} == {frozenset(pair) for pair in ((0, 1), (0, 2), (1, 2))}
    index, order = torch.arange(4) + 7, torch.tensor([2, 0, 3, 1])
    whole = pasted_pixels(LABEL, 5, index, 3, 1)
    assert torch.equal(pasted_pixels(LABEL[order], 5, index[order], 3, 1), whole[order])
    assert pasted_pixels(LABEL[:0], 5, index[:0], 3, 1).shape == (0, 2, 3)
