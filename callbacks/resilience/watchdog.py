"""A run that hangs names the rank that holds it up, shows where every rank is, and ends."""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lightspan.core.errors import UserError, printable
from lightspan.core.files.places import RunPath
from lightspan.core.files.runs import HEARTBEATS, STACKS

MOST_S = 30 * 86_400.0
"""The longest time without a hook that can be set: a month."""
HUNG = 124
"""Exit status of a run that hung, as that of timeout(1)."""
LAST_WORDS_S = 5.0
"""The longest time in seconds that ranks wait for each other's stacks."""
_COLLECTIVES = str(Path("torch", "distributed"))


@dataclass(frozen=True)
class Heartbeat:
    """What a rank tells the others: hooks passed since fit began, the last one, how long it has not moved, where its
    main thread is, whether it has noticed that the run hangs, and whether it has printed so. `turn` counts the
    messages, so that a silent rank shows; `waits` is whether the main thread is inside a collective operation, or a
    backward pass that may contain one.
    """

    rank: int
    beats: int
    step: int
    after: str
    idle_s: float
    at: str
    waits: bool
    turn: int
    gave_up: bool
    told: bool


class Watchdog(Callback):
    """Ends a run in which any rank passes no hook for `timeout_s` seconds.

    A thread of each rank writes the rank's heartbeat to `folder`/heartbeats. Rank 0 reads those of all, the others that
    of rank 0, so that the file system's work grows only linearly with the ranks; the hooks only count, so a step
    pays nothing. If a rank does not move, or its thread is silent because a library holds the
    interpreter, every rank writes the stacks of all its threads to `folder`/stacks/rank-N.txt, and the rank that
    passed the fewest hooks is named, of several the one outside a collective operation, where the others wait for it.
    All processes then end with status 124, which also works if the main thread is inside a collective. A rank
    whose interpreter is stuck writes its stacks nevertheless, from C, and ends with status 1.

    The time must cover the longest stretch without a hook: a compilation in the first step, a checkpoint, a batch
    that takes long to load. By themselves, collectives time out later or never (10 minutes with NCCL and 30 with
    gloo by default), and name no rank.

    Args:
        folder: the run folder, shared by all ranks; "" is the trainer's default_root_dir.
        timeout_s: seconds without a hook, in (0, 30 days].
        every_s: seconds between two checks; by default a tenth of `timeout_s`, at most 10.

    Raises: UserError for a value out of range.
    """

    alters_training = False  # see config.identity

    def __init__(self, folder: RunPath = "", timeout_s: float = 1800.0, every_s: float | None = None) -> None:
        if not 0 < timeout_s <= MOST_S:
            raise UserError(
                f"timeout_s={timeout_s} must be above 0 and at most {MOST_S:.0f} seconds; leave the callback out to "
                "wait for ever"
            )
        self.timeout_s = timeout_s
        self.every_s = min(timeout_s / 10, 10.0) if every_s is None else every_s
        if not 0 < self.every_s < timeout_s:
            raise UserError(f"every_s={every_s} must be above 0 and below timeout_s={timeout_s}")
        self.folder = folder
        self._last_words_s = min(LAST_WORDS_S, timeout_s)
        self._beats, self._after, self._moved_s = 0, "the start", 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._stacks: TextIO | None = None
        self._armed = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        folder = Path(self.folder or trainer.default_root_dir)
        stacks = folder / STACKS / f"rank-{trainer.global_rank}.txt"
        stacks.parent.mkdir(parents=True, exist_ok=True)
        heartbeat = _heartbeat_path(folder, trainer.global_rank)
        heartbeat.unlink(missing_ok=True)  # from an earlier start
        trainer.strategy.barrier("watchdog")  # no rank reads what an earlier start left
        self._beat("setup")
        self._over.clear()
        self._stacks = stacks.open("w")
        self._arm()
        self._thread = threading.Thread(target=self._watch, args=(trainer, folder), daemon=True, name="watchdog")
        self._thread.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._beat("the start of training")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._beat("the start of a batch")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._beat("the loss")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._beat("the backward pass")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._beat("the gradients")

    def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        self._beat("the end of a batch")

    def on_validation_batch_start(self, trainer: Trainer, *rest: Any) -> None:
        self._beat("the start of a validation batch")

    def on_validation_batch_end(self, trainer: Trainer, *rest: Any) -> None:
        self._beat("the end of a validation batch")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._beat("validation")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._beat("the start of a checkpoint")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop(trainer)

    def _beat(self, after: str) -> None:
        self._after, self._moved_s = after, time.monotonic()
        self._beats += 1

    def _stop(self, trainer: Trainer) -> None:
        self._over.set()
        if self._thread is None or self._stacks is None:
            return
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        stacks = Path(self._stacks.name)
        self._thread = self._stacks = None
        for left in (stacks, _heartbeat_path(stacks.parents[1], trainer.global_rank)):
            left.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # only the last rank finds it empty
                left.parent.rmdir()

    def _arm(self) -> None:
        """Starts a timer in C, in case no Python thread runs again; it fires late, so only in that case."""
        assert self._stacks is not None
        late_s = self.timeout_s + 3 * self.every_s + 2 * self._last_words_s
        self._armed = self._beats
        faulthandler.dump_traceback_later(late_s, file=self._stacks, exit=True)

    def _watch(self, trainer: Trainer, folder: Path) -> None:
        peers = _Peers(folder, trainer.global_rank, trainer.world_size)
        turn = 0
        while not self._over.wait(self.every_s):
            if self._armed != self._beats:
                self._arm()
            turn += 1
            self._tell(trainer, folder, turn)
            if peers.stand_still(self.timeout_s):
                self._give_up(trainer, folder, peers, turn + 1)

    def _tell(self, trainer: Trainer, folder: Path, turn: int, gave_up: bool = False, told: bool = False) -> None:
        idle_s = time.monotonic() - self._moved_s
        rank, step = trainer.global_rank, trainer.global_step
        mine = Heartbeat(rank, self._beats, step, self._after, idle_s, *_main_thread(), turn, gave_up, told)
        path = _heartbeat_path(folder, mine.rank)
        with contextlib.suppress(OSError):  # a full disk must not end the run from here
            path.parent.mkdir(exist_ok=True)
            half = path.with_suffix(".half")
            half.write_text(json.dumps(asdict(mine)))
            os.replace(half, path)  # complete for readers; what a power cut leaves of it does not matter

    def _give_up(self, trainer: Trainer, folder: Path, peers: "_Peers", turn: int) -> None:
        assert self._stacks is not None
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._tell(trainer, folder, turn, gave_up=True)
        until_s = time.monotonic() + self._last_words_s + 2 * self.every_s
        speaks = peers.choose_speaker(self.timeout_s)
        while not (peers.all_gave_up() if speaks else peers.were_told()) and time.monotonic() < until_s:
            time.sleep(self.every_s / 10)
            peers.read()
        if speaks:
            said = peers.account(self.timeout_s)
            print(printable(f"lightspan: {said}; stacks in {folder / STACKS}"), file=sys.stderr, flush=True)
            self._tell(trainer, folder, turn + 1, gave_up=True, told=True)
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and launcher.procs == [] and trainer.local_rank != 0:
            _wait_for_parent(self._last_words_s)  # Lightning kills its rank 0 when a rank that it started ends
        os._exit(HUNG)


class _Peers:
    """The heartbeats that this rank reads: rank 0 those of all ranks, the others that of rank 0."""

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self._folder, self._rank, self._ranks = folder, rank, ranks
        self._last: dict[int, Heartbeat] = {}
        self._heard_s = dict.fromkeys(range(ranks) if rank == 0 else (0,), time.monotonic())

    def read(self) -> None:
        for rank in self._heard_s:
            try:
                told = Heartbeat(**json.loads(_heartbeat_path(self._folder, rank).read_text()))
            except (OSError, ValueError, TypeError):
                continue
            if rank not in self._last or told.turn != self._last[rank].turn:
                self._last[rank], self._heard_s[rank] = told, time.monotonic()

    def stand_still(self, timeout_s: float) -> bool:
        self.read()
        return any(told.gave_up or told.idle_s > timeout_s for told in self._last.values()) or bool(
            self._silent(timeout_s)
        )

    def all_gave_up(self) -> bool:
        return len(self._last) == self._ranks and all(told.gave_up for told in self._last.values())

    def were_told(self) -> bool:
        return any(told.told for told in self._last.values())

    def choose_speaker(self, timeout_s: float) -> bool:
        """Whether this rank prints: rank 0, or if rank 0 is the silent one, rank 1, which then reads all."""
        if self._rank == 1 and self._silent(timeout_s):
            silent_s = self._heard_s[0]
            self._heard_s = {rank: silent_s if rank == 0 else time.monotonic() for rank in range(self._ranks)}
            return True
        return self._rank == 0

    def account(self, timeout_s: float) -> str:
        quiet = self._silent(timeout_s)
        if quiet:
            held = [f"rank {rank} has been silent for {self._idle_s(rank):.0f} s{self._where(rank)}" for rank in quiet]
            return "; ".join(held)
        fewest = min(told.beats for told in self._last.values())
        late = sorted(rank for rank, told in self._last.items() if told.beats == fewest)
        late = [rank for rank in late if not self._last[rank].waits] or late
        if len(late) < self._ranks or self._ranks == 1:
            return "; ".join(f"rank {rank} hangs{self._where(rank)}" for rank in late) + (
                "; the others wait for it" if self._ranks > 1 else ""
            )
        return f"all {self._ranks} ranks hang at the same point{self._where(0)}"

    def _where(self, rank: int) -> str:
        told = self._last.get(rank)
        return (
            "" if told is None else f" at {told.at}, in step {told.step} {self._idle_s(rank):.0f} s after {told.after}"
        )

    def _idle_s(self, rank: int) -> float:
        told = self._last.get(rank)
        return (0.0 if told is None else told.idle_s) + time.monotonic() - self._heard_s[rank]

    def _silent(self, timeout_s: float) -> list[int]:
        return [rank for rank, heard_s in self._heard_s.items() if time.monotonic() - heard_s > timeout_s]


def _heartbeat_path(folder: Path, rank: int) -> Path:
    return folder / HEARTBEATS / f"rank-{rank}.json"


def _main_thread() -> tuple[str, bool]:
    """(place, whether it waits for other ranks) of this process's main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "an unknown place", False
    place = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
    while frame is not None:
        if _COLLECTIVES in frame.f_code.co_filename or frame.f_code.co_name == "_engine_run_backward":
            return place, True
        frame = frame.f_back
    return place, False


def _wait_for_parent(limit_s: float) -> None:
    parent, until_s = os.getppid(), time.monotonic() + limit_s
    while os.getppid() == parent and time.monotonic() < until_s:
        time.sleep(0.1)
