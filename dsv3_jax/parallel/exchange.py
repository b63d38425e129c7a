"""How tokens reach experts that lie on other devices, and come back: `model.moe.Exchange`s for use inside `shard_map`.

An exchange is a row of stages: hops to the devices that hold a token's experts, then, on the spot, a row for each expert, sorted. A stage
takes rows out and brings results back, summed; out and back are each other's transpose, so two custom VJPs serve all stages.

    one hop     over `expert`: a token travels once to each device that holds any of its experts
    two hops    over `node`, then `local`: a token crosses to each node once, and spreads there over faster links (report §3.2.2)
    gather      everything to everybody: no buffers to size, the reference

FP8 recipes send e4m3 tiles out and the compute dtype back; gradients travel in the compute dtype both ways (report §3.3.2). Nothing is
dropped: buffers have a static size, and tokens that find no room make `RouterStats.fill` more than 1, upon which the step is run again
with larger buffers (buffers.py).
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import Exchange, Experts, Routing, exchange_locally
from dsv3_jax.parallel import buffers
from dsv3_jax.parallel.sharding import expert_axes
from dsv3_jax.precision import Activation, keep
from pallas_kernels import Quantized, gather_rows
from pallas_kernels.quantized import BLOCK


def over_mesh(config: ModelConfig, sizes: Mapping[str, int], size: float) -> Exchange:
    """The padded exchange of a mesh with those axis sizes: one hop, or two where `expert` is split.

    size: of the buffers, as a multiple of what balanced routing needs (`buffers.SIZES`).
    """
    axes = expert_axes(sizes)
    if all(sizes[axis] == 1 for axis in axes):
        return exchange_locally

    def exchange(x_TD: jax.Array, routing: Routing, experts: Experts):
        rooms, sorted_room = buffers.rooms(config, [sizes[axis] for axis in axes], x_TD.shape[0], size)
        hops = [Hop((axis,), sizes[axis], room) for axis, room in zip(axes, rooms)]
        return through(hops, sorted_room, x_TD, routing, experts)

    return exchange


def gathered(sizes: Mapping[str, int]) -> Exchange:
    """The all-gather exchange of such a mesh: every device sees the tokens of all, and always has room."""
    axes, devices = expert_axes(sizes), 1
    for axis in axes:
        devices *= sizes[axis]

    def exchange(x_TD: jax.Array, routing: Routing, experts: Experts):
        return through([Gather(axes, devices)], None, x_TD, routing, experts)

    return exchange


class Plan(NamedTuple):
    """Where rows go in one stage. taken [R]: the row that each place takes, T for none; places [T, M]: where the copies of each row
    are, R for none."""

    taken_R: jax.Array
    places_TM: jax.Array


class Rows(NamedTuple):
    """What travels. x [T, D] in the compute dtype, or e4m3; small float32 [T, ...], what goes along; gradient: None, or for e4m3 rows
    zeros like x in the compute dtype, whose cotangent is the rows' own (as in `precision.Activation`)."""

    x_TD: jax.Array
    small: jax.Array
    gradient: jax.Array | None


class Hop(NamedTuple):
    """A padded all-to-all over mesh axes, with room for so many rows from each device to each."""

    axes: tuple[str, ...]
    devices: int
    room: int

    def plan(self, device_TK: jax.Array) -> tuple[Plan, jax.Array]:
        """The plan for rows that go to devices [T, K] (nowhere: outside of 0..devices-1), and how full the fullest buffer is."""
        (num_rows, choices), none = device_TK.shape, self.devices * self.room
        goes_TN = jnp.any(device_TK[..., None] == jnp.arange(self.devices), axis=1)
        order_TN = jnp.cumsum(goes_TN, axis=0, dtype=jnp.int32) - 1
        fill = jnp.max(order_TN[-1] + 1).astype(jnp.float32) / self.room
        place_TN = jnp.where(goes_TN & (order_TN < self.room), order_TN + self.room * jnp.arange(self.devices, dtype=jnp.int32), none)
        row_TN = jnp.broadcast_to(jnp.arange(num_rows, dtype=jnp.int32)[:, None], place_TN.shape)
        taken_R = jnp.full((none,), num_rows, jnp.int32).at[place_TN].set(row_TN, mode="drop", unique_indices=False)
        # A row has no more copies than choices: the places that are none stand last.
        return Plan(taken_R, jnp.sort(place_TN, axis=1)[:, : min(choices, self.devices)]), fill

    def out(self, plan: Plan, *rows: jax.Array) -> list[jax.Array]:
        joined = _take(_join(rows), plan.taken_R)
        return _parts(lax.all_to_all(joined, self.axes, 0, 0, tiled=True), rows)

    def back(self, plan: Plan, *rows: jax.Array) -> list[jax.Array]:
        arrived = lax.all_to_all(_join(rows), self.axes, 0, 0, tiled=True)
        return [_sum_of_copies(y, plan) for y in _parts(arrived, rows)]


class Gather(NamedTuple):
    """Everything to everybody over mesh axes."""

    axes: tuple[str, ...]
    devices: int

    def plan(self, device_TK: jax.Array) -> tuple[None, jax.Array]:
        return None, jnp.zeros((), jnp.float32)

    def out(self, plan: None, *rows: jax.Array) -> list[jax.Array]:
        return [lax.all_gather(x, self.axes, tiled=True) for x in rows]

    def back(self, plan: None, *rows: jax.Array) -> list[jax.Array]:
        return [lax.psum_scatter(y.astype(jnp.float32), self.axes, tiled=True).astype(y.dtype) for y in rows]


class Sort(NamedTuple):
    """To rows sorted by expert, one for each of a token's experts that this device holds."""

    num_experts: int
    room: int

    def plan(self, expert_TK: jax.Array) -> tuple[Plan, jax.Array, jax.Array, jax.Array]:
        """The plan for experts [T, K] of this device (num_experts: none of them), the flat (t, k) of each row, group sizes [E], fill."""
        flat = expert_TK.reshape(-1)
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)
        end_E = jnp.cumsum(jnp.sum(flat[:, None] == jnp.arange(self.num_experts), axis=0, dtype=jnp.int32))
        fill = end_E[-1].astype(jnp.float32) / self.room
        end_E = jnp.minimum(end_E, self.room)  # a product never reads beyond its rows
        choice_R = order[: self.room]
        taken_R = jnp.where(jnp.arange(self.room) < end_E[-1], choice_R // expert_TK.shape[1], expert_TK.shape[0])
        places = jnp.where((flat < self.num_experts) & (inverse < self.room), inverse, self.room)
        return Plan(taken_R, places.reshape(expert_TK.shape)), choice_R, jnp.diff(end_E, prepend=0), fill

    def out(self, plan: Plan, *rows: jax.Array) -> list[jax.Array]:
        return [_take(x, plan.taken_R) for x in rows]

    def back(self, plan: Plan, *rows: jax.Array) -> list[jax.Array]:
        return [_sum_of_copies(y, plan) for y in rows]


def _take(x_TN: jax.Array, index_R: jax.Array) -> jax.Array:
    """x[index], zeros beyond the end."""
    return x_TN.at[index_R].get(mode="fill", fill_value=0) if x_TN.dtype.itemsize > 2 else gather_rows(x_TN, index_R)


def _sum_of_copies(y_RD: jax.Array, plan: Plan) -> jax.Array:
    copies_TMD = y_RD.at[plan.places_TM].get(mode="fill", fill_value=0)
    return jnp.sum(copies_TMD, axis=1, dtype=jnp.float32).astype(y_RD.dtype)


def _join(rows) -> jax.Array:
    """Arrays [R, N] side by side, for one all-to-all (two would be started one after the other): as unsigned integers of the narrowest."""
    if len(rows) == 1:
        return rows[0]
    joined = jnp.concatenate([_as_integers(x, min(x.dtype.itemsize for x in rows)) for x in rows], axis=1)
    return jnp.pad(joined, ((0, 0), (0, -joined.shape[1] % BLOCK)))  # as `gather_rows` has it best


def _parts(joined: jax.Array, like) -> list[jax.Array]:
    """The inverse of `_join`. like: arrays of such widths and dtypes."""
    if len(like) == 1:
        return [joined]
    ends = np.cumsum([x.shape[1] * x.dtype.itemsize // joined.dtype.itemsize for x in like])
    return [_from_integers(part, x.dtype) for part, x in zip(jnp.split(joined, ends, axis=1), like)]


def _as_integers(x_TN: jax.Array, itemsize: int) -> jax.Array:
    """[T, N] as unsigned integers of so many bytes, [T, N']."""
    return lax.bitcast_convert_type(x_TN, jnp.dtype(f"uint{8 * itemsize}")).reshape(x_TN.shape[0], -1)


def _from_integers(x_TN: jax.Array, dtype) -> jax.Array:
    """The inverse of `_as_integers`."""
    ratio = jnp.dtype(dtype).itemsize // x_TN.dtype.itemsize
    return lax.bitcast_convert_type(x_TN if ratio == 1 else x_TN.reshape(x_TN.shape[0], -1, ratio), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _out(stage, plan, rows: Rows) -> Rows:
    x_RD, small = stage.out(plan, rows.x_TD, rows.small)
    # The zeros are made here: sending them would cost as much as sending the rows.
    return Rows(x_RD, small, None if rows.gradient is None else jnp.zeros(x_RD.shape, rows.gradient.dtype))


def _out_bwd(stage, plan, d: Rows):
    gradient, small = stage.back(plan, d.x_TD if d.gradient is None else d.gradient, d.small)
    return None, Rows(gradient, small, None) if d.gradient is None else Rows(None, small, gradient)


_out.defvjp(lambda stage, plan, rows: (_out(stage, plan, rows), plan), _out_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _back(stage, plan, y_RD: jax.Array) -> jax.Array:
    return stage.back(plan, y_RD)[0]


_back.defvjp(lambda stage, plan, y_RD: (_back(stage, plan, y_RD), plan), lambda stage, plan, dy_TD: (None, stage.out(plan, dy_TD)[0]))


def through(
    hops, sorted_room: int | None, x_TD: jax.Array, routing: Routing, experts: Experts, num_experts: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The exchange over those hops. sorted_room: rows for the experts of this device; None: as many as could ever come.
    num_experts: on all devices, where they are not those that the router scores (copies are more)."""
    choices = routing.experts_TK.shape[1]
    rows = _pack(experts.enter(x_TD), routing)
    # The experts that can be reached from here: all of them, then after each hop a share.
    first, count = 0, num_experts or routing.stats.load_E.size
    fill, trail = jnp.zeros((), jnp.float32), []
    for hop in hops:
        count //= hop.devices
        plan, fullest = hop.plan((_chosen(rows, choices) - first) // count)
        rows = _out(hop, plan, rows)
        first = first + count * lax.axis_index(hop.axes)
        fill = jnp.maximum(fill, fullest)
        trail.append((hop, plan))
    rows = rows._replace(**keep({"x_TD": rows.x_TD, "small": rows.small}, "dispatched"))

    here_TK = _chosen(rows, choices) - first
    here_TK = jnp.where((here_TK >= 0) & (here_TK < count), here_TK, count)
    front_TK = jnp.argsort(here_TK, axis=1, stable=True)[:, : min(choices, count)]  # those that are here; there are no more of them
    here_TK, weights_TK = (jnp.take_along_axis(x, front_TK, axis=1) for x in (here_TK, rows.small[:, :choices]))
    sort = Sort(count, min(here_TK.size, sorted_room or here_TK.size))
    plan, choice_R, group_sizes_E, fullest = sort.plan(here_TK)
    sorted_rows = _out(sort, plan, rows._replace(small=rows.small[:, 2 * choices :]))
    y_RD = experts(_unpack(sorted_rows), group_sizes_E, weights_TK.reshape(-1)[choice_R])

    y_TD = _back(sort, plan, y_RD)
    for hop, plan in reversed(trail):
        y_TD = _back(hop, plan, y_TD)
    return y_TD, jnp.maximum(fill, fullest)


def _pack(tokens: jax.Array | Activation, routing: Routing) -> Rows:
    """Along with a token go its routing weights [K], its experts + 1 [K] (zero rows then have none), and the scales of e4m3 values."""
    small = [routing.weights_TK, routing.experts_TK.astype(jnp.float32) + 1]
    if not isinstance(tokens, Activation):
        return Rows(tokens, jnp.concatenate(small, axis=1), None)
    values, scales = lax.stop_gradient((tokens.quantised.values, tokens.quantised.scales()))
    return Rows(values, jnp.concatenate([*small, scales], axis=1), tokens.gradient)


def _chosen(rows: Rows, choices: int) -> jax.Array:
    return rows.small[:, choices : 2 * choices].astype(jnp.int32) - 1


def _unpack(rows: Rows) -> jax.Array | Activation:
    if rows.gradient is None:
        return rows.x_TD
    return Activation(Quantized.tiles(rows.x_TD, lax.stop_gradient(rows.small)), rows.gradient)
