import re
from typing import Any

import numpy as np
import pytest
import torch

from lightspan.core.errors import UserError
from lightspan.datamodules.image.sets.small import Digits
from lightspan.datamodules.image.variants.class_stream import ClassStream


def stream(**settings: object) -> ClassStream:
    data = ClassStream(Digits(), **{"batch_size": 50, **settings})
    data.setup()
    return data


def test_tasks_are_disjoint_cover_all_classes_and_follow_a_seed() -> None:
    one, same, other, plain = (ClassStream(Digits(), 3, order=order).tasks for order in (0, 0, 1, None))
    assert one == same != other
    assert sorted(label for task in one for label in task) == list(range(10))
    assert [len(task) for task in one] == [4, 3, 3]
    assert plain == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    given = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    assert ClassStream(Digits(), 2, order=given).tasks == [given[:5], given[5:]]
    for wrong in ([*range(9)], [*range(9), 8], [*range(1, 11)]):
        with pytest.raises(UserError, match="order="):
            ClassStream(Digits(), 2, order=wrong)


@pytest.mark.parametrize("passes", [1, 2])
def test_training_goes_through_the_tasks_in_sequence_and_no_batch_mixes_them(passes: int) -> None:
    data = stream(passes=passes)
    loader = data.train_dataloader()
    batches = list(loader)
    tasks = [{next(t for t, task in enumerate(data.tasks) if int(y) in task) for y in b["label"]} for b in batches]
    assert all(len(task) == 1 for task in tasks)
    numbers = [next(iter(task)) for task in tasks]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(5))
    labels = data.train.data.labels
    for number, task in enumerate(data.tasks):
        own = np.isin(labels, task).sum()
        assert numbers.count(number) == passes * own // 50
    seen = np.concatenate([batch["index"].numpy() for batch in batches])
    assert np.bincount(seen).max() == passes
    again = np.concatenate([batch["index"].numpy() for batch in loader])  # the second epoch has another order
    assert not np.array_equal(seen, again)


def test_a_run_resumes_in_the_middle_of_a_task() -> None:
    loader, resumed = stream().train_dataloader(), stream().train_dataloader()
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    resumed.load_state_dict(loader.state_dict())
    assert next(iter(resumed))["index"].tolist() == next(batches)["index"].tolist()


@pytest.mark.parametrize("settings", [{"order": 1}, {"order": None}])
def test_a_run_does_not_resume_in_another_order_of_as_many_images(settings: dict[str, Any]) -> None:
    """All ten classes are cut to the same number, so that every order of them has the same length."""
    saved, other = (stream(tasks=10, train_size=500, batch_size=10, **more) for more in ({}, settings))
    labels = np.arange(500) % 10
    for data in (saved, other):
        data.train.data = data.train.data._replace(labels=labels)
    position, loader = saved.train_dataloader().state_dict(), other.train_dataloader()
    assert position["length"] == len(loader.dataset)
    then, now = (re.escape(" | ".join(str(task[0]) for task in data.tasks)) for data in (saved, other))
    both = f"content classes {then}, each seen once, but this run has classes {now}, each seen once"
    with pytest.raises(UserError, match=both):
        loader.load_state_dict(position)


def test_validation_has_a_loader_for_each_task_and_the_bank_all_images() -> None:
    data = stream(tasks=2)
    loaders = data.val_dataloader()
    for task, loader in zip(data.tasks, loaders, strict=True):
        assert {int(y) for batch in loader for y in batch["label"]} == set(task)
    assert sum(len(batch["label"]) for loader in loaders for batch in loader) == 360
    assert sum(len(batch["label"]) for batch in data.bank_dataloader()) == 1437


def test_steps_are_those_of_the_loader_and_the_bank_of_a_task_has_each_of_its_images_once() -> None:
    data = stream(tasks=3, passes=2)
    assert sum(data.task_steps()) == len(data.train_dataloader())
    labels, seen = data.train.data.labels, 0
    for number, task in enumerate(data.tasks):
        assert data.task_steps()[number] == 2 * np.isin(labels, task).sum() // 50
        batches = list(data.task_bank(number))
        found = torch.cat([batch["label"] for batch in batches])
        assert sorted(found.tolist()) == sorted(labels[np.isin(labels, task)].tolist())
        images = torch.cat([batch["image"] for batch in batches])
        whole = torch.cat([batch["image"] for batch in data.bank_dataloader()])
        assert torch.equal(images, whole[torch.from_numpy(np.isin(labels, task))])
        seen += len(found)
    assert seen == len(labels)


def test_what_makes_no_stream_is_refused() -> None:
    with pytest.raises(UserError, match=r"tasks=11 must be in \[1, 10\], the classes of Digits"):
        ClassStream(Digits(), tasks=11)
    with pytest.raises(UserError, match="passes=0 at least 1"):
        ClassStream(Digits(), passes=0)
    with pytest.raises(UserError, match="order=-1 must be a seed from 0 up"):
        ClassStream(Digits(), order=-1)
    with pytest.raises(UserError, match="task 1 of ClassStream has no training images; raise train_size, or lower"):
        stream(tasks=10, train_size=5, batch_size=1).train_dataloader()
    with pytest.raises(UserError, match="task 0 of ClassStream has no validation images; raise val_size, or lower"):
        stream(tasks=10, val_size=3).val_dataloader()
    with pytest.raises(UserError, match=r"task 0 of ClassStream has .* fewer than batch_size=1000"):
        stream(batch_size=1000).train_dataloader()
