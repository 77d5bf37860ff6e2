"""What one universal perturbation does to accuracy downstream, and which defence restores it: an audit of an encoder.

Source: Zhou et al., "Downstream-agnostic Adversarial Examples", ICCV 2023, arXiv 2307.12280. A perturbation that is
trained on an encoder's features alone, with images of any kind, may break classifiers that others build on it. Whoever
publishes an encoder should know by how much. This audits an encoder that you hold, and keeps figures only: the
perturbation itself is not written anywhere.
Shapes: B images [C H W] of a batch, N images of a set, D features, K classes.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightspan.core.drawing import COLOURS, SOFT
from lightspan.core.errors import UserError
from lightspan.core.generators import drawn_from
from lightspan.core.results import Figure, Result
from lightspan.core.unit_length import unit_length
from lightspan.evaluation.estimator import Estimator
from lightspan.evaluation.labels import kind_of, require_different, require_few_classes, require_labels
from lightspan.evaluation.probes.knn import knn_mean
from lightspan.evaluation.probes.linear_probe import fit_linear_probe
from lightspan.evaluation.probes.probe_scores import half_interval
from lightspan.evaluation.robustness.audited import AuditedEncoder
from lightspan.evaluation.robustness.defences import Blurred, Jpeg, Noisy
from lightspan.evaluation.robustness.perturbations import (
    Direct,
    Everywhere,
    Perturbation,
    Placement,
    high_frequencies,
    random_signs,
)

RANDOM, UNDEFENDED = "random signs", "none"
Predicted = Callable[[Tensor], Tensor]


def apart(clean_BD: Tensor, moved_BD: Tensor, temperature: float) -> Tensor:
    """InfoNCE of clean features that look for their own among the perturbed ones: large where they are apart.

    Of the rows of this process alone: in an audit all ranks have the same.
    """
    own_B = torch.arange(len(clean_BD), device=clean_BD.device)
    return F.cross_entropy(unit_length(clean_BD) @ unit_length(moved_BD).T / temperature, own_B)


def perturbation_loss(
    features: Callable[[Tensor], Tensor],
    x_BCHW: Tensor,
    moved_BCHW: Tensor,
    alpha: float = 5.0,
    radius: float = 8.0,
    temperature: float = 0.1,
) -> Tensor:
    """-alpha InfoNCE(E(x), E(x')) + MSE(x', x) - MSE(HF(x'), HF(x)), to be minimised: features far apart, images near
    one another, and what differs in high frequencies.
    """
    with torch.no_grad():
        clean_BD = features(x_BCHW)
    pixels = F.mse_loss(moved_BCHW, x_BCHW)
    fine = F.mse_loss(high_frequencies(moved_BCHW, radius), high_frequencies(x_BCHW, radius))
    return pixels - fine - alpha * apart(clean_BD, features(moved_BCHW), temperature)


@dataclass(frozen=True)
class UniversalRobustness(Result):
    """Accuracy under perturbations that know nothing of the task.

    Attributes:
        rows: mappings with perturbation; defence, "none" first; clean and perturbed, the accuracy of the linear head
            with that defence, which the rehearsed head has for each perturbation anew; interval, half of the 95 %
            interval of perturbed over the images that are scored; lost, clean - perturbed; lost_interval, the same of
            it, with both answers of an image beside each other; decline, lost / clean, 0 where nothing was right;
            fooled, the share of predictions that the perturbation changes.
        neighbours: the same without a defence, of the vote of the nearest neighbours.
        chance: accuracy of the most frequent class.
        change: root mean square over pixels of x' - x, by perturbation.
        surrogates, train, test: images.
    """

    rows: tuple[dict[str, Any], ...]
    neighbours: tuple[dict[str, Any], ...]
    chance: float
    change: dict[str, float]
    surrogates: int
    train: int
    test: int

    @property
    def worst(self) -> str:
        """The perturbation that leaves least to an encoder without a defence; the random one only if it is alone."""
        trained = [row for row in self._undefended() if row["perturbation"] != RANDOM] or self._undefended()
        return min(trained, key=lambda row: row["perturbed"])["perturbation"]

    def best_defence(self) -> str:
        """What leaves the largest accuracy under the worst perturbation, which may be "none"."""
        rows = [row for row in self.rows if row["perturbation"] == self.worst]
        return max(rows, key=lambda row: row["perturbed"])["defence"]

    def figures(self) -> tuple[Figure, ...]:
        first = self._undefended()[0]
        found = [Figure("clean accuracy", 100 * first["clean"], "%")]
        for row in sorted(self._undefended(), key=lambda row: row["perturbation"] == RANDOM):
            name = ("floor: " if row["perturbation"] == RANDOM else "") + row["perturbation"]
            found += [
                Figure(f"accuracy under the perturbation, {name}", 100 * row["perturbed"], "%"),
                Figure("  half of its 95 % interval", 100 * row["interval"], "points"),
                Figure(f"accuracy lost, {name}", 100 * row["lost"], "points"),
                Figure("  half of its 95 % interval", 100 * row["lost_interval"], "points"),
                Figure(f"predictions that change, {name}", 100 * row["fooled"], "%"),
            ]
        found += [
            Figure(f"{what} with the defence {row['defence']}", 100 * row[key], "%")
            for row in self.rows
            if row["perturbation"] == self.worst and row["defence"] != UNDEFENDED
            for key, what in (("perturbed", f"accuracy under {self.worst}"), ("clean", "clean accuracy"))
        ]
        found.append(Figure("clean accuracy of neighbours", 100 * self.neighbours[0]["clean"], "%"))
        found += [
            Figure(f"accuracy of neighbours under {row['perturbation']}", 100 * row["perturbed"], "%")
            for row in self.neighbours
        ]
        found += [Figure(f"change of pixels, {name}", value) for name, value in self.change.items()]
        return (
            *found,
            Figure("chance: accuracy of the most frequent class", 100 * self.chance, "%"),
            Figure("images without labels", self.surrogates),
            Figure("images that the heads learn from", self.train),
            Figure("images that are scored", self.test),
        )

    def table(self) -> tuple[dict[str, Any], ...]:
        return tuple({**row, "chance": self.chance} for row in self.rows)

    def draw(self, axes: Any) -> None:
        defences = list(dict.fromkeys(row["defence"] for row in self.rows))
        kinds = list(dict.fromkeys(row["perturbation"] for row in self.rows))
        width = 0.8 / len(kinds)
        place = torch.arange(len(defences)).double()
        for number, (kind, colour) in enumerate(zip(kinds, (SOFT, *COLOURS * 9), strict=False)):
            rows = [row for row in self.rows if row["perturbation"] == kind]
            clean, heights, reach = ([row[key] for row in rows] for key in ("clean", "perturbed", "interval"))
            at = (place - 0.4 + width * (number + 0.5)).tolist()
            name = f"floor: {kind}" if kind == RANDOM else kind
            axes.bar(at, heights, 0.9 * width, yerr=reach, color=colour, capsize=2, label=name)
            # Each bar inside an outline of its own head: the rehearsed one is another for each perturbation.
            label = None if number else "clean, the same head"
            axes.bar(at, clean, 0.9 * width, fill=False, edgecolor="black", linewidth=0.8, label=label)
        axes.axhline(self.chance, color=SOFT, linewidth=1, linestyle=":", label="chance")
        axes.set_xticks(place.tolist(), defences, rotation=20, ha="right")
        axes.set(xlabel="defence", ylabel="accuracy")
        highest = max(max(row["clean"], row["perturbed"] + row["interval"]) for row in self.rows)
        axes.set_ylim(top=1.25 * max(highest, self.chance, 0.1))
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper left")

    def _undefended(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["defence"] == UNDEFENDED]


class UniversalPerturbation(Estimator):
    """Trains perturbations on an encoder's features of images without labels, and scores heads of another task.

    Each is compared with random signs of the same bounds, and tried against these defences: those of the images before
    the encoder; `pruned units`, without the features that are least active on clean images (Liu et al., "Fine-Pruning",
    2018, arXiv 1805.12185, on the last layer); `rehearsed head`, which also learns from images under a perturbation of
    another seed; and `hardened encoder`, which keeps its features under a perturbation that is trained at the same time
    (after Shafahi et al., "Universal Adversarial Training", 2020, arXiv 1811.11304, without labels), and against which
    the audited ones are then trained anew. Modules, weights and buffers stay as they were.

    Args:
        perturbations: by name; None is `Direct`. The paper's is `Generated`.
        placement: where they lie; None is everywhere, at most 10 / 255 a pixel.
        steps: of Adam, at least 1.
        batch_size: at least 2; of fewer images, all.
        alpha, radius, temperature: of `perturbation_loss`; at least 0, at least 0, above 0.
        defences: of images, by name; None is blur, noise and JPEG.
        pruned: share of the features that `pruned units` leaves out, in [0, 1).
        hardening_steps: at least 0; 0 leaves out the `hardened encoder`.
        hardening_rate: of its Adam, above 0.
        l2: of the heads, as in `lightspan.evaluation.probes.linear_probe`, above 0.
        k: neighbours, at least 1; of fewer images, all.
        seed: at least 0.
    """

    def __init__(
        self,
        perturbations: Mapping[str, Perturbation] | None = None,
        placement: Placement | None = None,
        steps: int = 200,
        batch_size: int = 64,
        alpha: float = 5.0,
        radius: float = 8.0,
        temperature: float = 0.1,
        defences: Mapping[str, nn.Module] | None = None,
        pruned: float = 0.1,
        hardening_steps: int = 50,
        hardening_rate: float = 1e-4,
        l2: float = 1.0,
        k: int = 20,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("steps", steps, 1), ("batch_size", batch_size, 2), ("hardening_steps", hardening_steps, 0), ("k", k, 1),
            ("seed", seed, 0), ("alpha", alpha, 0), ("radius", radius, 0),
        ):  # fmt: skip
            if not least <= value < math.inf:
                raise UserError(f"UniversalPerturbation {name}={value} must be at least {least}, and finite")
        for name, number in (("temperature", temperature), ("hardening_rate", hardening_rate), ("l2", l2)):
            if not 0 < number < math.inf:
                raise UserError(f"UniversalPerturbation {name}={number} must be above 0 and finite")
        if not 0 <= pruned < 1:
            raise UserError(f"UniversalPerturbation pruned={pruned} must be at least 0 and below 1")
        self.perturbations = dict({"direct": Direct()} if perturbations is None else perturbations)
        self.defences = dict({"blur": Blurred(), "noise": Noisy(), "JPEG": Jpeg()} if defences is None else defences)
        taken = {RANDOM, UNDEFENDED, "pruned units", "rehearsed head", "hardened encoder"}
        if wrong := taken & (self.perturbations.keys() | self.defences.keys()):
            raise UserError(f"UniversalPerturbation has a part named {min(wrong)!r} already; choose another name")
        self.placement = Everywhere() if placement is None else placement
        self.steps, self.batch_size, self.k, self.seed = steps, batch_size, k, seed
        self.terms = {"alpha": alpha, "radius": radius, "temperature": temperature}
        self.pruned, self.hardening_steps, self.hardening_rate, self.l2 = pruned, hardening_steps, hardening_rate, l2

    def fit(self, audited: AuditedEncoder) -> UniversalRobustness:
        """Raises: UserError for fewer than two images without labels, none of the task, images that are not in [0, 1]
        or of other sizes, labels that are no classes, an encoder through which no gradient passes, or features that are
        not finite.
        """
        known_N, asked_N = _checked(audited)
        with _frozen(audited.encoder), torch.inference_mode(False), torch.enable_grad():
            if not audited.features(audited.surrogate[:2].float().requires_grad_()).requires_grad:
                raise UserError(
                    f"no gradient passes {type(audited.encoder).__name__} and its transforms; take ones that pass it on"
                )
            rows, neighbours, change = self._undefended(audited, known_N, asked_N)
            if self.hardening_steps and any(True for _ in audited.encoder.parameters()):
                hardened = audited.of(self._hardened(audited))
                with _frozen(hardened.encoder):
                    head = self._head(self._encoded(hardened, hardened.train), known_N)
                    clean = head(self._encoded(hardened, hardened.test))
                    for name in (RANDOM, *self.perturbations):
                        moved = self._moved(hardened, hardened.test, self.perturbation(hardened, name, self.seed))
                        found = _scored(clean, head(self._encoded(hardened, moved)), asked_N)
                        rows.append({"perturbation": name, "defence": "hardened encoder"} | found)
        names = [RANDOM, *self.perturbations]
        rows.sort(key=lambda row: names.index(row["perturbation"]))
        chance = float((asked_N == known_N.bincount().argmax()).double().mean())
        counts = (len(part) for part in (audited.surrogate, audited.train, audited.test))
        return UniversalRobustness(tuple(rows), tuple(neighbours), chance, change, *counts)

    def _undefended(
        self, audited: AuditedEncoder, known_N: Tensor, asked_N: Tensor
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
        """Rows of all defences that keep the encoder, of neighbours, and changes of pixels."""
        train_ND, test_ND = (self._encoded(audited, x) for x in (audited.train, audited.test))
        head, vote = self._head(train_ND, known_N), self._vote(train_ND, known_N)
        active_D = train_ND.abs().mean(dim=0).argsort(descending=True, stable=True)
        kept_D = active_D[: len(active_D) - int(self.pruned * len(active_D))]
        pruned = self._head(train_ND[:, kept_D], known_N)
        rows, neighbours, change = list[dict[str, Any]](), list[dict[str, Any]](), dict[str, float]()
        guarded = {name: self._encoded(audited, guard(audited.test)) for name, guard in self.defences.items()}
        for name in (RANDOM, *self.perturbations):
            moved = self._moved(audited, audited.test, self.perturbation(audited, name, self.seed))
            change[name] = float((moved - audited.test).double().square().mean().sqrt())
            moved_ND = self._encoded(audited, moved)
            other = self._moved(audited, audited.train, self.perturbation(audited, name, self.seed + 1))
            rehearsed = self._head(torch.cat([train_ND, self._encoded(audited, other)]), known_N.repeat(2))
            pairs: dict[str, tuple[Predicted, Tensor, Tensor]] = {UNDEFENDED: (head, test_ND, moved_ND)}
            for which, guard in self.defences.items():
                pairs[which] = (head, guarded[which], self._encoded(audited, guard(moved)))
            pairs["pruned units"] = (pruned, test_ND[:, kept_D], moved_ND[:, kept_D])
            pairs["rehearsed head"] = (rehearsed, test_ND, moved_ND)
            for which, (predicted, clean, under) in pairs.items():
                scores = _scored(predicted(clean), predicted(under), asked_N)
                rows.append({"perturbation": name, "defence": which} | scores)
            neighbours.append({"perturbation": name} | _scored(vote(test_ND), vote(moved_ND), asked_N))
        return rows, neighbours, change

    def perturbation(self, audited: AuditedEncoder, name: str, seed: int) -> Tensor:
        """Trained or random [C H W], between its bounds; `name` is one of `perturbations`, or `RANDOM`."""
        generator, shape = torch.Generator().manual_seed(seed), tuple(audited.surrogate.shape[1:])
        if name == RANDOM:
            return random_signs(shape, self.placement, generator)
        how, place = self.perturbations[name], self.placement
        with drawn_from(seed):
            module = how.begin(shape, place).to(audited.device)
        optimizer = torch.optim.Adam(module.parameters(), how.step(place), how.betas)
        for x in self._batches(audited, self.steps, generator):
            loss = perturbation_loss(audited.features, x, place.apply(x, place.bounded(module())), **self.terms)
            if not loss.isfinite():
                raise UserError("an audit got features that are NaN or infinite; the encoder has diverged")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            how.project(module, place)
        return place.bounded(module().detach()).cpu()

    def _batches(self, audited: AuditedEncoder, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Images without labels, in a new order in each pass; what is left of a pass is left out."""
        size, order_N = min(self.batch_size, len(audited.surrogate)), torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order_N) < size:
                order_N = torch.randperm(len(audited.surrogate), generator=generator)
            chosen_B, order_N = order_N[:size], order_N[size:]
            yield audited.surrogate[chosen_B].float().to(audited.device)

    def _hardened(self, audited: AuditedEncoder) -> nn.Module:
        """A copy whose features of perturbed and of clean images are trained to be the encoder's of clean ones."""
        encoder = copy.deepcopy(audited.encoder).requires_grad_(True)
        own, place = audited.of(encoder), self.placement
        generator = torch.Generator().manual_seed(self.seed + 2)
        delta_CHW = random_signs(tuple(audited.surrogate.shape[1:]), place, generator).to(audited.device) / 2
        optimizer = torch.optim.Adam(encoder.parameters(), self.hardening_rate)
        for x in self._batches(audited, self.hardening_steps, generator):
            with torch.no_grad():
                target_BD = audited.features(x)
            scale = target_BD.var().clamp_min(1e-12)
            delta_CHW = delta_CHW.detach().requires_grad_(True)
            moved = F.mse_loss(own.features(place.apply(x, delta_CHW)), target_BD)
            optimizer.zero_grad()
            ((moved + F.mse_loss(own.features(x), target_BD)) / scale).backward()
            optimizer.step()
            assert delta_CHW.grad is not None
            step = 0.1 * (place.high - place.low) * delta_CHW.grad.sign()
            delta_CHW = place.bounded(delta_CHW.detach() + step)
        return encoder

    def _encoded(self, audited: AuditedEncoder, x: Tensor) -> Tensor:
        """Features [N D] on the CPU, without gradients."""
        with torch.no_grad():
            z_ND = torch.cat([audited.features(part.float()).cpu() for part in x.split(self.batch_size)])
        if not z_ND.isfinite().all() or not z_ND.shape[1]:
            raise UserError(f"an audit got features {list(z_ND.shape)} that are none, NaN or infinite")
        return z_ND

    def _moved(self, audited: AuditedEncoder, x: Tensor, delta_CHW: Tensor) -> Tensor:
        return self.placement.apply(x.float(), delta_CHW)

    def _head(self, train_ND: Tensor, known_N: Tensor) -> Predicted:
        weight_DK, bias_K = fit_linear_probe(train_ND, known_N, self.l2)
        return lambda z_ND: (z_ND.double() @ weight_DK + bias_K).argmax(dim=1)

    def _vote(self, train_ND: Tensor, known_N: Tensor) -> Predicted:
        shares_NK = F.one_hot(known_N).double()
        return lambda z_ND: knn_mean(train_ND, shares_NK, z_ND, min(self.k, len(train_ND))).argmax(dim=1)


def _scored(clean_N: Tensor, perturbed_N: Tensor, asked_N: Tensor) -> dict[str, float]:
    clean_right_N, right_N = ((each == asked_N).double() for each in (clean_N, perturbed_N))
    lost_N = clean_right_N - right_N
    clean, lost = float(clean_right_N.mean()), float(lost_N.mean())
    return {
        "clean": clean,
        "perturbed": float(right_N.mean()),
        "interval": half_interval(right_N),
        "lost": lost,
        "lost_interval": half_interval(lost_N),
        "decline": lost / clean if clean else 0.0,
        "fooled": float((clean_N != perturbed_N).double().mean()),
    }


def _checked(audited: AuditedEncoder) -> tuple[Tensor, Tensor]:
    """(classes to learn from, classes to score by), int64."""
    classes = []
    for what, x, label_N in (
        ("surrogate", audited.surrogate, None),
        ("train", audited.train, audited.train_label_N),
        ("test", audited.test, audited.test_label_N),
    ):
        if x.ndim != 4 or x.shape[1:] != audited.surrogate.shape[1:] or not x[:1].numel():
            raise UserError(
                f"an audit got {what} images {list(x.shape)} beside {list(audited.surrogate.shape)}; give all three "
                "sets images [N, C, H, W] of one size"
            )
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise UserError(f"an audit got {what} images with numbers outside [0, 1]; undo their standardisation")
        if what == "surrogate":
            continue
        if label_N is None or kind_of(label_N) != "classes":
            raise UserError(f"an audit needs a class for each of the {what} images; choose a task with classes")
        require_labels(f"audit, {what}", x, label_N)
        require_few_classes(f"audit, {what}", label_N)
        require_different(f"audit, {what}", label_N)
        classes.append(label_N.cpu().long())
    if len(audited.surrogate) < 2:
        raise UserError("an audit needs at least two surrogate images, to tell features apart")
    return classes[0], classes[1]


@contextmanager
def _frozen(encoder: nn.Module) -> Iterator[None]:
    """Inside, the encoder is in evaluation mode and no weight has a gradient."""
    modes = [(part, part.training) for part in encoder.modules()]
    trained = [(weight, weight.requires_grad) for weight in encoder.parameters()]
    encoder.eval().requires_grad_(False)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for weight, needed in trained:
            weight.requires_grad_(needed)
