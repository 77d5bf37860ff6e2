"""Concrete merging (arXiv 2312.06173) on digits under four orders of their pixels, beside merges without a mask.

Four tasks are the 8 x 8 digits, each under an order of the 64 pixels of its own. A network 64-256-256 with a frozen
head is pretrained on their mixture for 60 steps and fine-tuned on each; `evidence/merged_tasks.py` has the split,
`evidence/merged_arms.py` the arms.
"""

from merged_arms import measure
from merged_tasks import Task, World, digits, shuffled_pixels, world


def made(seed: int) -> World:
    tasks = {f"order {i}": Task(digits(), shuffled_pixels(i), seed) for i in range(4)}
    return world(tasks, seed, pretraining=60, epochs=20, hidden=(256, 256), lr=1e-4)


def test_a_learned_mask_keeps_tasks_apart(evidence) -> None:
    evidence.note(
        "Digits under four orders of their pixels; 899 pictures to train on, 449 without labels to adapt on, 449 to "
        "score on, split anew for each seed. The width, the steps of pretraining and the rate of fine-tuning were "
        "chosen on the search seed as ones where task arithmetic gains over the base; where specialists were trained "
        "at a rate of 0.001, or with turns in place of orders, every merge was near the base or below it, and "
        "those by entropy far below."
    )
    measure(evidence, made, seeds=range(10, 15))
