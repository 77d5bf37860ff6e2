"""A part has a second name in the module, and none in its checkpoints."""

import torch
from torch import nn

from lightspan.nn.submodule_alias import submodule_alias


class Held(nn.Module):
    backbone = submodule_alias("student.0", "The student's.")

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(2, 3), nn.ReLU())


def test_a_part_is_the_submodule_itself_and_checkpoints_hold_it_once() -> None:
    held = Held()
    assert held.backbone is held.student[0]
    assert set(held.state_dict()) == {"student.0.weight", "student.0.bias"}
    assert Held.backbone.__doc__ == "The student's."
    held.student[0] = nn.Linear(2, 4)
    assert held.backbone(torch.zeros(1, 2)).shape == (1, 4)
