import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightspan.nn.teachers.centring import Centre


def test_the_centre_is_the_running_mean_in_float32_and_a_batch_of_none_leaves_it() -> None:
    centre = Centre(3, momentum=0.9)
    a, b = torch.randn(4, 3), torch.randn(2, 3)
    for rows in (a, b):
        centre.see(rows)
        centre.follow()
    torch.testing.assert_close(centre(), 0.9 * (0.1 * a.mean(dim=0)) + 0.1 * b.mean(dim=0))
    before = centre().clone()
    centre.see(torch.zeros(0, 3))
    centre.follow()
    centre.follow()  # nothing was seen
    torch.testing.assert_close(centre(), before)
    centre.see(a.bfloat16())
    centre.follow()
    assert centre().dtype == torch.float32
    assert centre.state_dict().keys() == {"centre_K"}


def test_micro_batches_of_a_step_count_as_one_and_a_step_that_was_not_taken_is_forgotten() -> None:
    centre, whole = Centre(3), Centre(3)
    a, b = torch.randn(4, 3), torch.randn(2, 3)
    centre.see(torch.full((2, 3), torch.nan), step=6)  # skipped: nothing follows it
    for rows in (a, b):
        centre.see(rows, step=7)
        assert not centre().any()
    whole.see(torch.cat([a, b]))
    for one in (centre, whole):
        one.follow()
    torch.testing.assert_close(centre(), whole())


def test_a_plan_may_show_rows_of_several_fake_modes_without_a_step() -> None:
    centre = Centre(3)
    for _ in range(2):
        with FakeTensorMode():
            centre.see(torch.zeros(4, 3))
