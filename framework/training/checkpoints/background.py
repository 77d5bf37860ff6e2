"""Writing while training continues: one thread, in order, and without losing errors."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lightspan.core.errors import UserError


class Background:
    """Runs jobs one after another in a thread. After one has failed, the others are dropped until `wait` has reported
    it.

    So a job may rely on those before it: the pointer moves, and an old checkpoint is deleted, once the new one is
        whole.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="lightspan-checkpoint")
        self._jobs: list[tuple[Path, Future[None]]] = []
        self._failed = False

    def submit(self, path: Path, job: Callable[[], None]) -> None:
        """Queues a job about `path` and returns; after `close` there is no queue, and the job is done at once."""
        if self._thread is None:
            job()
            return

        def run() -> None:
            if self._failed:
                return
            try:
                job()
            except BaseException:
                self._failed = True
                raise

        self._jobs.append((path, self._thread.submit(run)))

    def wait(self) -> None:
        """Returns when all jobs are done. Raises: UserError with the path of the first that failed."""
        jobs, self._jobs = self._jobs, []
        errors = [(path, error) for path, job in jobs if (error := job.exception()) is not None]
        self._failed = False
        for path, error in errors:
            if isinstance(error, UserError):
                raise error
            raise UserError(f"writing checkpoint {path} in the background failed: {error!r}") from error

    def close(self) -> None:
        """Ends the thread after its last job; `wait` still raises errors."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def staged(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy in CPU memory that later steps do not change; tensors that shared memory still share it."""
    copy = DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
    ).stage(checkpoint)
    assert isinstance(copy, dict)
    return copy
