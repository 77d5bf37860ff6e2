"""The ledger of a run: which samples it consumed, and whether any was repeated, skipped or never seen."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightspan.cli.config.allow import RUN
from lightspan.cli.config.resolve import recorded
from lightspan.core.errors import UserError
from lightspan.core.files.foreign import NUMBERS, settings_object
from lightspan.core.files.runs import LEDGER

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1

CALLBACK = "lightspan.callbacks.watching.ledger.Ledger"

# Above these, a file is not a ledger, and counting would not end.
MOST_SAMPLES, MOST_EPOCHS, MOST_SEEN = 10**10, 10**6, 10**12


@dataclass(frozen=True)
class Account:
    """The totals of a ledger. N samples in the data set.

    consumed: samples trained on, each counted as often as it was. epochs: {epoch: samples consumed in it}.
    repeated, skipped: [(epoch, first, last)] positions in an epoch's order consumed more than once, or skipped.
    dropped: samples in tails of epochs that did not fill a batch, which is not an error.
    times: int64 [N], how often each sample was trained on. replaced: damaged samples that were replaced by others.
    numbers: int64 [N], the number of each sample in the data, of which there are `of`; training may see a part of them.
    """

    consumed: int
    epochs: dict[int, int]
    repeated: list[tuple[int, int, int]]
    skipped: list[tuple[int, int, int]]
    dropped: int
    times: "np.ndarray"
    replaced: int
    left_out: int
    numbers: "np.ndarray"
    of: int

    @property
    def exact(self) -> bool:
        return not (self.repeated or self.skipped or self.replaced or self.left_out)


def read_ledger(run_dir: Path) -> dict[str, Any]:
    """The ledger of a run folder. Raises: UserError if there is none, or it has another format."""
    path = run_dir / LEDGER
    try:
        path.stat()  # raises what is missing
        ledger = settings_object(path)
        _refuse_other_content(ledger)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_why_none(run_dir)}") from error
    except ValueError as error:
        raise UserError(f"{path} is not the ledger of a run: {error}; name another run folder") from error
    return dict(ledger)


def _why_none(run_dir: Path) -> str:
    """Why a run has no ledger, according to its recorded configuration."""
    spec = {"class_path": CALLBACK, "init_args": {"path": f"{RUN}/{LEDGER}"}}
    try:
        trainer = recorded(run_dir).get("trainer")
        callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
    except UserError:
        callbacks = None
    entries = callbacks.values() if isinstance(callbacks, dict) else ()
    if spec in entries:
        return (
            "the run has the Ledger callback, which writes at the first checkpoint and at the end, and only if the "
            "training loader has the same order on any number of ranks: the loaders of lightspan's data modules "
            "and of lightspan.datamodules.loading.ranks.train_loader have one, your own DataLoader has none"
        )
    path = f"{{path: {RUN}/{LEDGER}}}"
    return f"a run keeps a ledger if trainer.callbacks has {{class_path: {CALLBACK}, init_args: {path}}}"


def _refuse_other_content(ledger: Any) -> None:
    """Raises ValueError for what `Ledger` never writes; the file may come from elsewhere."""
    from lightspan.datamodules.loading.order import unpacked

    _require(isinstance(ledger, dict) and "format" in ledger, "it has no format")
    _require(ledger["format"] == FORMAT, f"its format is {ledger['format']!r:.40}, this lightspan reads {FORMAT}")
    data, ranges, replaced = (ledger.get(key) for key in ("data", "ranges", "replaced"))
    _require(isinstance(data, dict), "data is not a mapping")
    sizes, damage = data.get("sizes"), data.get("damage")
    _require(isinstance(sizes, list) and all(_within(size, 0, MOST_SAMPLES) for size in sizes), "data.sizes")
    length = sum(sizes)
    _require(_within(length, 1, MOST_SAMPLES), f"data.sizes: {length} samples are not in [1, {MOST_SAMPLES}]")
    limits = {"window": (1, MOST_SAMPLES), "epoch_samples": (0, length), "batch_size": (1, MOST_SAMPLES)}
    for key, (least, most) in limits.items():
        _require(_within(data.get(key), least, most), f"data.{key} is not a whole number in [{least}, {most}]")
    _require(_within(data.get("seed"), 0, 2**64), "data.seed")
    _require(isinstance(damage, list), "data.damage is not a list")
    if (part := data.get("part")) is not None:
        known = isinstance(part, dict) and _within(part.get("of"), length, MOST_SAMPLES)
        _require(known and isinstance(part.get("samples"), str), "data.part")
        _require(len(unpacked(part["samples"], part["of"])) == length, f"data.part has not {length} samples")
    _require(isinstance(ranges, list), "ranges is not a list")
    for span in ranges:
        known = isinstance(span, list) and len(span) == 3 and all(_within(number, 0, length) for number in span[1:])
        _require(
            known and _within(span[0], 0, MOST_EPOCHS) and span[1] < span[2], f"range {span!r:.60} is not in {length}"
        )
    if (times := ledger.get("times")) is not None:
        known = isinstance(times, list) and len(times) == length
        _require(known and all(_within(count, 0, MOST_SEEN) for count in times), f"times are not {length} counts")
    _require(isinstance(replaced, list), "replaced is not a list")
    for entry in replaced:
        _require(
            isinstance(entry, dict)
            and entry.keys() >= {"step", "damaged", "by", "reason"}
            and all(_within(entry[key], 0, length - 1) for key in ("damaged", "by")),
            f"replaced {entry!r:.60} names no samples",
        )


def _within(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def balance(ledger: dict[str, Any]) -> Account:
    """Counts every position of every epoch, and every sample; memory: about 32 bytes per sample.

    Raises: TooMuchError for more samples than the limit of numbers, since a ledger of a few bytes may claim any.
    """
    import numpy as np

    from lightspan.datamodules.loading.order import Order, unpacked

    data, ranges = ledger["data"], ledger["ranges"]
    order = Order(tuple(data["sizes"]), data["window"])
    length, used = len(order), data["epoch_samples"]
    NUMBERS.require(length)
    last_epoch = max((epoch for epoch, _, _ in ranges), default=-1)
    given = ledger.get("times")
    times = np.zeros(length, dtype=np.int64) if given is None else np.array(given, dtype=np.int64)
    epochs: dict[int, int] = {}
    repeated: list[tuple[int, int, int]] = []
    skipped: list[tuple[int, int, int]] = []
    spans: dict[int, list[list[int]]] = {}
    for span in ranges:
        spans.setdefault(span[0], []).append(span)
    for epoch in range(last_epoch + 1):
        if epoch not in spans:
            skipped.append((epoch, 0, used))
            epochs[epoch] = 0
            continue
        changes = np.zeros(length + 1, dtype=np.int64)
        for _, first, last in spans[epoch]:
            changes[first] += 1
            changes[last] -= 1
        counts = np.cumsum(changes[:-1])  # of each position in this epoch's order
        end = used if epoch < last_epoch else int(np.flatnonzero(counts)[-1]) + 1
        repeated += [(epoch, first, last) for first, last in true_stretches(counts > 1)]
        skipped += [(epoch, first, last) for first, last in true_stretches(counts[:end] == 0)]
        if given is None:
            times[order.epoch(data["seed"], epoch)] += counts
        epochs[epoch] = int(counts.sum())
    for entry in ledger["replaced"]:
        times[entry["damaged"]] -= 1
        times[entry["by"]] += 1
    part = data.get("part")
    return Account(
        consumed=sum(epochs.values()),
        epochs=epochs,
        repeated=repeated,
        skipped=skipped,
        dropped=max(last_epoch, 0) * (length - used),
        times=times,
        replaced=len(ledger["replaced"]),
        left_out=len(data["damage"]),
        numbers=np.arange(length) if part is None else unpacked(part["samples"], part["of"]),
        of=length if part is None else part["of"],
    )


def true_stretches(flags: "np.ndarray") -> list[tuple[int, int]]:
    """[first, last) of every stretch of true values."""
    import numpy as np

    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
