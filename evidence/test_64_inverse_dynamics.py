"""Inverse dynamics pretraining (arXiv 2305.16985) on a point that flies to goals which nobody sees.

Arms with one encoder and equal steps, on 1000 demonstrations of 1000 goals that no batch says, in pictures with a
distractor: inverse dynamics, behaviour cloning, and an autoencoder of pixels; beside them the untrained encoder. A
demonstration has 6 steps, on the way: near goals that are hidden, a place tells nothing of what is done there. Then the
code is frozen, and a policy learns from it what 5 demonstrations of a new goal do, of 30 steps; of 50 rollouts for each
of 8 new goals, those count that end within 0.05 of it, a twelfth of the square's side. A linear probe reads the point's
place from the code of other episodes. Rates are chosen by rollouts to goals of the search seed.

Floor: the untrained encoder. Ceiling: the true place instead of a code. Gate: the arm's own loss on steps that it
trains on, by that of the best constant guess.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import seed_everything
from own_loss import own_loss
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightspan.backbones.spatial_encoder import SpatialEncoder
from lightspan.datamodules.worlds.point_mass import PointMass
from lightspan.evaluation.features.features import Features
from lightspan.evaluation.probes.probes import LinearProbe
from lightspan.methods.supervised.behaviour_cloning import BehaviourCloning
from lightspan.methods.supervised.inverse_dynamics import InverseDynamics
from lightspan.nn.heads.action_head import ContinuousActions
from lightspan.objectives.means import squared_error
from lightspan.optim.schedules import WarmupCosine
from lightspan.training.method import Method

SEEDS, SEARCH = (0, 1, 2, 3, 4), 100
STEPS, BATCH, WIDTH = 600, 64, 64
EPISODES, EPISODE_STEPS = 1000, 6
DEMONSTRATIONS, GOALS, ROLLOUTS = 5, 8, 50
POLICY_STEPS, POLICY_RATE = 300, 1e-3
LARGER = 2.0
"""Radius of the distractor by the point's."""
LEARNED = {"inverse dynamics": 0.5, "behaviour cloning": 0.04, "autoencoder": 0.5}
"""By what share of the variance an arm's own loss falls at least; with hidden goals, places tell 0.06 of actions."""
RATES = (1e-3, 3e-3, 1e-2)


class Autoencoder(Method):
    """Draws its image again from the code."""

    def __init__(self, backbone: nn.Module, **optimisation: Any) -> None:
        super().__init__(**optimisation)
        self.backbone = backbone
        self.decoder = nn.Sequential(
            nn.Linear(WIDTH, 32 * 6 * 6), nn.GELU(), nn.Unflatten(1, (32, 6, 6)),
            nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.GELU(), nn.ConvTranspose2d(32, 3, 4, 2, 1),
        )  # fmt: skip

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return squared_error(self.decoder(self.backbone(batch["image"])), batch["image"])


def encoder() -> SpatialEncoder:
    return SpatialEncoder(3, channels=(16, 32, 32, 32), strides=(2, 1, 1, 1), maps=32, width=WIDTH)


def optimisation(rate: float) -> dict[str, Any]:
    return {"optimizer": partial(torch.optim.AdamW, lr=rate), "lr_scheduler": partial(WarmupCosine, final=0.0)}


ARMS: dict[str, Any] = {
    "inverse dynamics": lambda rate: InverseDynamics(encoder(), ContinuousActions(2 * WIDTH, 2), **optimisation(rate)),
    "behaviour cloning": lambda rate: BehaviourCloning(encoder(), ContinuousActions(WIDTH, 2), **optimisation(rate)),
    "autoencoder": lambda rate: Autoencoder(encoder(), **optimisation(rate)),
}


def standardised(frames: np.ndarray) -> Tensor:
    """Of uint8 [N S S 3]."""
    return (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - 0.1) / 0.2


def steps_of(world: PointMass) -> dict[str, Tensor]:
    """All steps of a world."""
    found: dict[str, list[Tensor]] = {"image": [], "next_image": [], "action": [], "state": []}
    for _, place_T2, action_T2, frames in world.played():
        images = standardised(frames)
        for name, rows in (("image", images[:-1]), ("next_image", images[1:])):
            found[name].append(rows)
        for name, numbers in (("action", action_T2), ("state", place_T2)):
            found[name].append(torch.from_numpy(numbers[:-1]))
    return {name: torch.cat(rows) for name, rows in found.items()}


def batches(steps: dict[str, Tensor], seed: int, count: int) -> DataLoader:
    generator = np.random.default_rng(seed)
    rows = [torch.from_numpy(generator.choice(len(steps["image"]), BATCH, replace=False)) for _ in range(count)]
    return DataLoader(
        [*range(count)], batch_size=None, collate_fn=lambda step: {name: x[rows[step]] for name, x in steps.items()}
    )


def coded(network: nn.Module | None, image: Tensor, state: Tensor) -> Tensor:
    """The codes of images; without a network the places, in units of the square."""
    if network is None:
        return state.float() / 0.3
    with torch.no_grad():
        return torch.cat([network(part) for part in image.split(500)])


def policy(code: Tensor, action: Tensor, seed: int) -> nn.Module:
    """Cloned from frozen codes."""
    torch.manual_seed(seed)
    head = ContinuousActions(code.shape[1], 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=POLICY_RATE)
    schedule = WarmupCosine(optimizer, POLICY_STEPS, final=0.0)
    for _ in range(POLICY_STEPS):
        optimizer.zero_grad()
        squared_error(head(code), action).backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def success(network: nn.Module | None, seed: int) -> float:
    """Of policies for new goals, in per cent."""
    shares = []
    for goal in range(GOALS):
        world = PointMass(DEMONSTRATIONS, tasks_seed=7000 + 100 * seed + goal, goals=1, larger=LARGER, seed=seed)
        given = steps_of(world)
        head = policy(coded(network, given["image"], given["state"]), given["action"], seed)

        @torch.no_grad()
        def acts(frames: np.ndarray, place: np.ndarray, head: nn.Module = head) -> np.ndarray:
            return head(coded(network, standardised(frames), torch.from_numpy(place))).numpy()

        shares.append(world.success(acts, world.goal_of_tasks()[0], ROLLOUTS, seed + goal))
    return 100 * float(np.mean(shares))


def place_r2(network: nn.Module | None, seed: int) -> float:
    """Of a linear probe of the place, by episodes for other goals than it is scored on."""
    features = []
    for part in (1, 2):
        given = steps_of(PointMass(50, tasks_seed=9000 + seed + 500 * part, larger=LARGER, seed=seed + 10 * part))
        code = coded(network, given["image"], given["state"])
        features.append(Features(code, given["state"], torch.arange(len(code))))
    return LinearProbe().fit(*features).scores["r2"]


def pretrained(arm: str, seed: int, rate: float) -> tuple[Method, float]:
    """(the trained method, its loss on steps that it trained on by that of the best constant guess)."""
    seed_everything(seed, verbose=False)
    method = ARMS[arm](rate)
    training = steps_of(PointMass(EPISODES, tasks_seed=seed, steps=EPISODE_STEPS, larger=LARGER, seed=seed))
    few = [*batches(training, seed + 1, 16)]
    quiet_trainer(max_steps=STEPS).fit(method, batches(training, seed, STEPS))
    target = training["image" if arm == "autoencoder" else "action"]
    constant = float(target.var(dim=0, correction=0).mean())
    return method.eval(), own_loss(partial(ARMS[arm], rate), method.state_dict(), few) / constant


def rollouts_of(arm: str, rate: float) -> float:
    return success(pretrained(arm, SEARCH, rate)[0].backbone, SEARCH)


def test_inverse_dynamics(evidence):
    rates = evidence.search({arm: partial(rollouts_of, arm) for arm in ARMS}, RATES)
    reached: dict[str, dict[int, float]] = {arm: {} for arm in (*ARMS, "untrained", "true place")}
    read: dict[str, dict[int, float]] = {arm: {} for arm in reached}
    for arm in ARMS:
        runs = {seed: pretrained(arm, seed, rates[arm]) for seed in SEEDS}
        evidence.gate(
            arm, {seed: left for seed, (_, left) in runs.items()}, 1.0, by=LEARNED[arm],
            unit="of the variance", lower_is_better=True,
        )  # fmt: skip
        for seed, (method, _) in runs.items():
            reached[arm][seed], read[arm][seed] = (f(method.backbone, seed) for f in (success, place_r2))
    for seed in SEEDS:
        seed_everything(seed, verbose=False)
        network = encoder().eval()
        reached["untrained"][seed], read["untrained"][seed] = success(network, seed), place_r2(network, seed)
        reached["true place"][seed], read["true place"][seed] = success(None, seed), place_r2(None, seed)
    for arm, of_seed in reached.items():
        for seed, value in of_seed.items():
            evidence.figure(f"rollouts that reach a new goal, {arm}", value, seed, "%")
            evidence.figure(f"R2 of the place, {arm}", read[arm][seed], seed)

    def above(found: dict[str, dict[int, float]], arm: str, other: str) -> dict[int, float]:
        return {seed: found[arm][seed] - found[other][seed] for seed in SEEDS}

    for other, margin in (("behaviour cloning", 15.0), ("autoencoder", 15.0), ("untrained", 15.0)):
        evidence.claim(
            f"rollouts that reach a new goal, inverse dynamics minus {other}",
            above(reached, "inverse dynamics", other), at_least=margin, unit="points",
            arms=[arm for arm in ("inverse dynamics", other) if arm in ARMS],
            floor=above(reached, "untrained", other), ceiling=above(reached, "true place", other),
        )  # fmt: skip
    evidence.claim(
        "R2 of the place, inverse dynamics minus behaviour cloning",
        above(read, "inverse dynamics", "behaviour cloning"), at_least=0.15,
        arms=("inverse dynamics", "behaviour cloning"), floor=above(read, "untrained", "behaviour cloning"),
        ceiling=above(read, "true place", "behaviour cloning"),
    )  # fmt: skip
