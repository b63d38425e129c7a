"""Experts in slots: copies of the busy ones, moved while the engine serves as their load changes (EPLB, parallel/eplb.py).

Every `interval` steps the tokens that went to each expert since the last time move the average that is planned for. After each step that
follows, one layer is planned anew, and where its plan differs its weights and its table of slots change together, so that every step finds
a whole plan and none waits for more than one layer. All of this is values, never shapes: no program is compiled again.
"""

import logging
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.parallel import eplb
from dsv3_jax.parallel.replicas import Moves, add_slots, move
from dsv3_jax.serving.ranks import WHOLE, Ranks

log = logging.getLogger("dsv3_jax.serving")


class Balance(NamedTuple):
    """Totals: times that all layers were planned, replicas and bytes sent between devices; imbalance (fullest device over the mean, mean
    over layers) of the last interval, as it was served and as the plan made after it would have served it."""

    plans: int = 0
    moved_replicas: int = 0
    moved_bytes: int = 0
    imbalance: float = 1.0
    planned_imbalance: float = 1.0


class Balancer:
    """Args: params, as they lie on the ranks: their experts are laid out in slots and moved, in these very dicts; redundant: slots
    beyond one for each expert; interval: steps between plans, 0 for none.

    plan [layers, slots]: the expert of each slot. Raises UserError where the slots do not divide over the devices.
    """

    def __init__(self, config: ModelConfig, params: dict, ranks: Ranks, *, redundant: int, interval: int):
        self._config, self._params, self._ranks, self._interval = config, params, ranks, interval
        check(self._config, self._ranks, redundant)
        self.stats = Balance()
        self._average: np.ndarray | None = None
        self._steps = 0
        parts, experts = self._ranks.expert_parts, self._config.n_routed_experts
        held = (experts + redundant) // parts
        empty = np.full((parts, held), -1)
        empty[:, : experts // parts] = np.arange(experts).reshape(parts, -1)
        first = empty.copy()
        for device in range(parts):  # what is left takes copies of the next device's experts
            first[device, experts // parts :] = np.resize(np.roll(np.arange(experts), -(device + 1) * experts // parts), redundant // parts)
        layers = len(params["moe_layers"])
        self.plan = np.tile(empty.reshape(-1), (layers, 1))
        self._most_copies = redundant + 1
        for layer in range(layers):
            weights = self._experts(layer)
            weights |= add_slots(dict(weights), held, self._ranks.mesh)
            self._change(layer, first.reshape(-1))
        self._bytes_per_expert = sum(leaf.nbytes // leaf.shape[0] for name, leaf in self._experts(0).items() if name != "slots")
        self._counted = np.zeros((layers, experts), np.int32)  # tokens of each expert up to this interval
        self._load: np.ndarray | None = None  # and in the last one
        self._planned = layers  # layers of the plan that is being made; all: none is

    def after_step(self, load_LE: jax.Array) -> bool:
        """Call after each step with the tokens of each expert so far (`Runner.load_LE`): now and then plans a layer. Whether any moved."""
        self._steps += 1
        if self._planned < len(self.plan):
            moved = self._plan_layer(self._planned)
            self._planned += 1
            if self._planned == len(self.plan):
                self._report()
            return moved
        if self._interval and self._steps % self._interval == 0:
            before, self._counted = self._counted, np.array(load_LE)
            self._load = (self._counted - before).astype(np.float64)  # what has run over comes back
            if self._load.any():
                self._average = eplb.moving_average(self._average, self._load)
                self.stats = self.stats._replace(imbalance=self._imbalance())
                self._planned = 0
        return False

    def _imbalance(self) -> float:
        return float(eplb.imbalance(self._load, self.plan, self._ranks.expert_parts).mean())

    def _plan_layer(self, layer: int) -> bool:
        before, parts = self.plan[layer : layer + 1], self._ranks.expert_parts
        average = self._average[layer : layer + 1]
        after, _, _ = eplb.rebalance_experts(average, before.shape[1], self._config.n_group, 1, parts, previous=before)
        if (after == before).all():
            return False
        # Every data rank's devices do the same.
        count = int(eplb.moved_replicas(before, after, parts)[0]) * (self._ranks.count // parts)
        self.stats = self.stats._replace(
            moved_replicas=self.stats.moved_replicas + count, moved_bytes=self.stats.moved_bytes + count * self._bytes_per_expert
        )
        self._change(layer, after[0])
        return True

    def _report(self) -> None:
        self.stats = self.stats._replace(plans=self.stats.plans + 1, planned_imbalance=self._imbalance())
        log.info(
            f"Expert load imbalance: {self.stats.imbalance:.3f}, with the new plan {self.stats.planned_imbalance:.3f}; moved so far: "
            f"{self.stats.moved_replicas} replicas, {self.stats.moved_bytes / 2**20:.0f} MiB"
        )

    def _change(self, layer: int, after: np.ndarray) -> None:
        """Moves weights to their new slots, on the device and not waited for, and puts the new table beside them."""
        mesh, parts = self._ranks.mesh, self._ranks.expert_parts
        moves, experts = Moves.between(self.plan[layer], after, parts), self._experts(layer)
        weights = {name: leaf for name, leaf in experts.items() if name != "slots"}
        experts |= move(weights, moves.padded(len(after) // parts), np.int32(len(moves.source)), mesh)
        self.plan[layer] = after
        table, _ = eplb.index(after[None], self._config.n_routed_experts)
        table = np.pad(table[0], ((0, 0), (0, self._most_copies - table.shape[2])), constant_values=-1).astype(np.int32)
        experts["slots"] = jax.device_put(table, NamedSharding(mesh, WHOLE))

    def _experts(self, layer: int) -> dict:
        return self._params["moe_layers"][layer]["mlp"]["experts"]


def check(config: ModelConfig, ranks: Ranks, redundant: int) -> None:
    """Raises UserError where experts and copies do not lie evenly over the mesh."""
    parts = ranks.expert_parts
    if not config.num_moe_layers or parts == 1:
        raise UserError("experts are balanced over the devices of expert: give a mesh with expert=2 or more, and a model with experts")
    if redundant < 0 or redundant % parts:
        nearest = max(0, round(redundant / parts) * parts)
        raise UserError(f"{redundant} redundant experts do not divide over expert={parts}: the nearest is {nearest}")
