import torch

from lightspan.nn.teachers.centring import Centre


def test_the_centre_is_the_running_mean_in_float32_and_a_batch_of_none_leaves_it() -> None:
    centre = Centre(3, momentum=0.9)
    a, b = torch.randn(4, 3), torch.randn(2, 3)
    centre.follow(a)
    centre.follow(b)
    torch.testing.assert_close(centre(), 0.9 * (0.1 * a.mean(dim=0)) + 0.1 * b.mean(dim=0))
    before = centre().clone()
    centre.follow(torch.zeros(0, 3))
    torch.testing.assert_close(centre(), before)
    centre.follow(a.bfloat16())
    assert centre().dtype == torch.float32
    assert centre.state_dict().keys() == {"centre_K"}
