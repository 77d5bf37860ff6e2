from lightspan.nn.step_buffer import StepBuffer


def test_what_a_step_leaves_is_taken_once_in_order_and_a_step_that_was_not_taken_is_forgotten() -> None:
    kept = StepBuffer[str]()
    assert kept.take() == []
    kept.add("skipped", step=0)
    for part in ("first", "second"):
        kept.add(part, step=1)
    taken = kept.take()
    assert taken == ["first", "second"]
    assert kept.take() == []
    kept.add("later", step=1)
    assert taken == ["first", "second"]  # nothing of it is shared
    assert kept.take() == ["later"]
