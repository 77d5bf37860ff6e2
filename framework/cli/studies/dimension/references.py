"""What an intrinsic dimension is compared with and needs no training: figures of the untrained network."""

from collections import Counter
from typing import Any

from lightspan.cli.config.build import Built, Resolved, build, with_layer
from lightspan.core.errors import UserError


def references(resolved: Resolved, seeds: dict[int, int], metric: str) -> dict[str, Any]:
    """Figures of the untrained network, one for each seed if the seed matters.

    Returns: "untrained" {seed: metric}, that is d = 0; "linear_probe", the mean accuracy of logistic regression on the
    frozen features, None if module or data have none; "constant_answer", the share of the most frequent class among
    the validation samples, None if batches have no label; "parameters", how many numbers train.

    Args:
        seeds: {seed: seed_everything}.
    Raises: UserError for a metric that validation does not log.
    """
    untrained: dict[str, float] = {}
    probes = []
    for seed, drawn in seeds.items():
        built = build(with_layer(resolved, {"seed_everything": drawn, "trainer": {"logger": False}}))
        logged = _validated(built)
        if metric not in logged:
            raise UserError(
                f"--metric {metric!r} is not logged by the validation of {resolved.name}; it logs "
                + (", ".join(sorted(logged)) or "nothing: give the recipe validation data and a validation_step")
            )
        untrained[str(seed)] = logged[metric]
        probes.append(_probed(built))
    known = [probe for probe in probes if probe is not None]
    return {
        "untrained": untrained,
        "linear_probe": sum(known) / len(known) if known else None,
        "constant_answer": _most_frequent(built),
        "parameters": sum(p.numel() for p in built.model.parameters() if p.requires_grad),
    }


def _validated(built: Built) -> dict[str, float]:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        results = built.trainer.validate(built.model, datamodule=built.datamodule, verbose=False)
    except MisconfigurationException as error:
        raise UserError(f"performance is read from validation, which this recipe does not have: {error}") from error
    return {name: float(value) for result in results for name, value in result.items()}


def _probed(built: Built) -> float | None:
    from lightspan.callbacks.watching.online_probes import OnlineProbes
    from lightspan.evaluation.probes.probes import LinearProbe

    probes = OnlineProbes({"linear": LinearProbe()})
    built.trainer.callbacks.append(probes)  # type: ignore[attr-defined]  # a connector of the trainer sets it
    try:
        return _validated(built).get("probe/linear_accuracy")
    except UserError:  # no features, no bank of training samples, or no labels
        return None
    finally:
        built.trainer.callbacks.remove(probes)  # type: ignore[attr-defined]


def _most_frequent(built: Built) -> float | None:
    counts: Counter[int] = Counter()
    for batch in built.datamodule.val_dataloader() if built.datamodule is not None else ():
        if not isinstance(batch, dict) or "label" not in batch:
            return None
        counts.update(batch["label"].tolist())
    return max(counts.values()) / counts.total() if counts else None
