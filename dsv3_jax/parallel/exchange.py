"""How tokens reach experts that lie on other devices, and come back: `model.moe.Exchange`s for use inside `shard_map`.

An exchange is a row of hops to the devices that hold a token's experts, then, on the spot, a row for each expert, sorted. Each takes rows
out and brings results back, summed; out and back are each other's transpose.

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
from pallas_kernels import Quantized, gather_rows, scatter_rows
from pallas_kernels.quantized import BLOCK, E4M3, num_blocks


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
    """Where rows go in one hop. taken [R]: the row that each place takes, T for none; places [T, M]: where the copies of each row
    are, R for none."""

    taken_R: jax.Array
    places_TM: jax.Array


class Rows(NamedTuple):
    """What travels.

    bits: the rows as `Layout` has them, which carry no gradient. gradient: zeros [T, D] in the compute dtype that nothing reads, whose
    cotangent is that of the values (as in `precision.Activation`). weights [T, K]: the routing weights among the bits.
    """

    bits: tuple[jax.Array, ...]
    gradient: jax.Array
    weights_TK: jax.Array


class Layout(NamedTuple):
    """A row is one string of bits, so that one all-to-all moves it (two would be started one after the other): unsigned integers [T, N],
    first its values, then, from a multiple of BLOCK columns on, numbers that go along: the routing weights of its `choices` experts, these
    experts + 1 (a zero row has none), the scales of e4m3 values.

    Where a row starts, values and numbers are two such matrices; `gather_rows` lays them side by side on its way.
    """

    dtype: np.dtype  # of the values
    number: np.dtype  # what goes along: float32, or float64 in tests
    width: int
    choices: int

    @property
    def columns(self) -> int:
        """Integers that hold the values."""
        return self.width * self.dtype.itemsize // _itemsize(self.dtype)

    def pack(self, values_TD: jax.Array, weights_TK: jax.Array, experts_TK: jax.Array, *scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        numbers = jnp.concatenate([weights_TK, experts_TK.astype(self.number) + 1, *scales], axis=1)
        return lax.stop_gradient(tuple(_as_integers(x, _itemsize(self.dtype)) for x in (values_TD, numbers)))

    def weights(self, bits: jax.Array) -> jax.Array:
        return self._numbers(bits, 0, self.choices)

    def experts(self, bits: jax.Array) -> jax.Array:
        """[T, K], -1: none."""
        return self._numbers(bits, self.choices, 2 * self.choices).astype(jnp.int32) - 1

    def scales(self, bits: jax.Array) -> jax.Array:
        return self._numbers(bits, 2 * self.choices, 2 * self.choices + num_blocks(self.width))

    def _numbers(self, bits, begin, end):
        first, integers = num_blocks(self.columns) * BLOCK, self.number.itemsize // bits.dtype.itemsize
        return _from_integers(bits[:, first + begin * integers : first + end * integers], self.number)


class Hop(NamedTuple):
    """A padded all-to-all over mesh axes, with room for so many rows from each device to each."""

    axes: tuple[str, ...]
    devices: int
    room: int

    def plan(self, device_TK: jax.Array) -> tuple[Plan, jax.Array]:
        """The plan for rows that go to devices [T, K] (nowhere: outside of 0..devices-1), and how full the fullest buffer is."""
        (num_rows, choices), none = device_TK.shape, self.devices * self.room
        order_TN, load_N = _order(device_TK, self.devices)
        fill = jnp.max(load_N).astype(jnp.float32) / self.room
        place_TN = jnp.where(order_TN < self.room, order_TN + self.room * jnp.arange(self.devices, dtype=jnp.int32), none)
        row_TN = jnp.broadcast_to(jnp.arange(num_rows, dtype=jnp.int32)[:, None], place_TN.shape)
        taken_R = jnp.full((none,), num_rows, jnp.int32).at[place_TN].set(row_TN, mode="drop", unique_indices=False)
        if choices < self.devices:  # a row has no more copies than choices: the places that are none stand last
            place_TN = jnp.sort(place_TN, axis=1)[:, :choices]
        return Plan(taken_R, place_TN), fill

    def out(self, plan: Plan, *bits: jax.Array) -> jax.Array:
        return lax.all_to_all(_take(bits, plan), self.axes, 0, 0, tiled=True)

    def back(self, plan: Plan, y_RD: jax.Array) -> jax.Array:
        return _sum_of_copies(lax.all_to_all(y_RD, self.axes, 0, 0, tiled=True), plan.places_TM)


class Gather(NamedTuple):
    """Everything to everybody over mesh axes."""

    axes: tuple[str, ...]
    devices: int

    def plan(self, device_TK: jax.Array) -> tuple[Plan, jax.Array]:
        row_T = jnp.arange(len(device_TK), dtype=jnp.int32)
        return Plan(row_T, row_T[:, None]), jnp.zeros((), jnp.float32)

    def out(self, plan: Plan, *bits: jax.Array) -> jax.Array:
        return lax.all_gather(_take(bits, plan), self.axes, tiled=True)

    def back(self, plan: Plan, y_RD: jax.Array) -> jax.Array:
        return lax.psum_scatter(y_RD.astype(jnp.float32), self.axes, tiled=True).astype(y_RD.dtype)


class Sorted(NamedTuple):
    """Where rows go that are sorted by expert, one for each of a token's experts that this device holds. places [T, M]: of a token in those
    rows (R: none); choice [R]: the flat (t, m) of a row (none: T·M); group_sizes [E]."""

    places_TM: jax.Array
    choice_R: jax.Array
    group_sizes_E: jax.Array


def _sort(expert_TM: jax.Array, num_experts: int, room: int) -> tuple[Sorted, jax.Array]:
    """By experts [T, M] of this device (num_experts: none of them) into so many rows, and the fill."""
    order_TE, load_E = _order(expert_TM, num_experts)  # counted, where a sort would be a dozen kernels
    end_E = jnp.cumsum(load_E)
    place_TE = jnp.minimum(order_TE + end_E - load_E, room)
    places_TM = jnp.take_along_axis(place_TE, expert_TM, axis=1, mode="fill", fill_value=room)
    choice = jnp.arange(expert_TM.size, dtype=jnp.int32).reshape(expert_TM.shape)
    choice_R = jnp.full((room,), expert_TM.size, jnp.int32).at[places_TM].set(choice, mode="drop")
    group_sizes_E = jnp.diff(jnp.minimum(end_E, room), prepend=0)  # a product never reads beyond its rows
    return Sorted(places_TM, choice_R, group_sizes_E), end_E[-1].astype(jnp.float32) / room


def _order(part_TM: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Of rows that go to parts [T, M] (each to a part once, or nowhere: outside of 0..parts-1) the first, second, ... of each part
    [T, parts], very large where a row does not go; and how many go to each."""
    goes_TN = jnp.any(part_TM[..., None] == jnp.arange(parts), axis=1)
    count_TN = jnp.cumsum(goes_TN, axis=0, dtype=jnp.int32)
    return jnp.where(goes_TN, count_TN - 1, np.iinfo(np.int32).max // 2), count_TN[-1]


def _take(bits: tuple[jax.Array, ...], plan: Plan) -> jax.Array:
    """Rows of matrices of unsigned integers, side by side; zeros for none."""
    return gather_rows(bits, plan.taken_R, implementation=_implementation(bits[0]))


def _spread(bits: jax.Array, plan: Sorted, columns: int) -> jax.Array:
    """Rows of unsigned integers to the rows of their experts; zeros behind those."""
    filled, rows = jnp.sum(plan.group_sizes_E, dtype=jnp.int32), plan.choice_R.size
    return scatter_rows(bits, plan.places_TM, filled, rows=rows, columns=columns, implementation=_implementation(bits))


def _implementation(bits: jax.Array) -> str | None:
    """Values of float32 run anywhere."""
    return "reference" if bits.dtype.itemsize == 4 else None


def _rows_or_zeros(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x; zeros where the index is beyond the last.

    None is negative, and XLA is told so: it would look for those by an array that a microbatch's forward shares with the backward of
    another beside it, make one kernel of both, and the backward's experts would wait for the forward's tokens.
    """
    return x.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _sum_of_copies(y_RD: jax.Array, places_TM: jax.Array) -> jax.Array:
    return jnp.sum(_rows_or_zeros(y_RD, places_TM), axis=1, dtype=jnp.float32).astype(y_RD.dtype)


def _itemsize(dtype: np.dtype) -> int:
    """Bytes of the integers that values travel as."""
    return min(dtype.itemsize, 4)


def _as_integers(x_TN: jax.Array, itemsize: int) -> jax.Array:
    """[T, N] as unsigned integers of so many bytes, [T, N']."""
    return lax.bitcast_convert_type(x_TN, jnp.dtype(f"uint{8 * itemsize}")).reshape(x_TN.shape[0], -1)


def _from_integers(x_TN: jax.Array, dtype) -> jax.Array:
    """The inverse of `_as_integers`."""
    ratio = jnp.dtype(dtype).itemsize // x_TN.dtype.itemsize
    return lax.bitcast_convert_type(x_TN if ratio == 1 else x_TN.reshape(x_TN.shape[0], -1, ratio), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _out(hop, layout: Layout, plan: Plan, rows: Rows) -> Rows:
    bits = hop.out(plan, *rows.bits)
    # The zeros are made here: sending them would cost as much as sending the rows.
    return Rows((bits,), jnp.zeros((len(bits), layout.width), rows.gradient.dtype), layout.weights(bits))


_out.defvjp(
    lambda hop, layout, plan, rows: (_out(hop, layout, plan, rows), plan),
    lambda hop, layout, plan, d: (None, Rows(None, hop.back(plan, d.gradient), hop.back(plan, d.weights_TK))),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_experts(layout: Layout, plan: Sorted, bits: jax.Array, gradient: jax.Array) -> jax.Array | Activation:
    """Rows as experts take them. gradient: as in `Rows`."""
    values = _from_integers(_spread(bits, plan, layout.columns), layout.dtype)
    if layout.dtype != E4M3:
        return values
    scales = _rows_or_zeros(layout.scales(bits), plan.choice_R // plan.places_TM.shape[1])
    return Activation(Quantized.tiles(values, scales), jnp.zeros(values.shape, gradient.dtype))


_to_experts.defvjp(
    lambda layout, plan, bits, gradient: (_to_experts(layout, plan, bits, gradient), plan.places_TM),
    lambda layout, places_TM, d: (None, None, _sum_of_copies(d.gradient if isinstance(d, Activation) else d, places_TM)),
)


@jax.custom_vjp
def _from_experts(plan: Sorted, y_RD: jax.Array) -> jax.Array:
    """The sum of each row's experts on this device."""
    return _sum_of_copies(y_RD, plan.places_TM)


def _from_experts_bwd(plan, dy_TD):
    bits = _as_integers(dy_TD, _itemsize(dy_TD.dtype))
    return None, _from_integers(_spread(bits, plan, bits.shape[1]), dy_TD.dtype)


_from_experts.defvjp(lambda plan, y_RD: (_from_experts(plan, y_RD), plan), _from_experts_bwd)


@jax.custom_vjp
def _weights_of_rows(weights_TM: jax.Array, choice_R: jax.Array, places_TM: jax.Array) -> jax.Array:
    return _rows_or_zeros(weights_TM.reshape(-1), choice_R)


# Held apart: XLA would take the sums over whole rows, which the gradients are, into the gather, as a loop of one thread each.
_weights_of_rows.defvjp(
    lambda weights_TM, choice_R, places_TM: (_weights_of_rows(weights_TM, choice_R, places_TM), places_TM),
    lambda places_TM, d_R: (_rows_or_zeros(lax.optimization_barrier(d_R), places_TM), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _back(hop, plan: Plan, y_RD: jax.Array) -> jax.Array:
    return hop.back(plan, y_RD)


def _back_bwd(hop, plan, dy_TD):
    return None, _from_integers(hop.out(plan, _as_integers(dy_TD, _itemsize(dy_TD.dtype))), dy_TD.dtype)


_back.defvjp(lambda hop, plan, y_RD: (_back(hop, plan, y_RD), plan), _back_bwd)


def through(
    hops, sorted_room: int | None, x_TD: jax.Array, routing: Routing, experts: Experts, num_experts: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """The exchange over those hops. sorted_room: rows for the experts of this device; None: as many as could ever come.
    num_experts: on all devices, where they are not those that the router scores (copies are more)."""
    tokens, experts_TK, choices = experts.enter(x_TD), routing.experts_TK, routing.experts_TK.shape[1]
    if isinstance(tokens, Activation):
        values, scales, gradient = tokens.quantised.values, [tokens.quantised.scales()], tokens.gradient
    else:
        values, scales, gradient = tokens, [], tokens
    layout = Layout(values.dtype, routing.weights_TK.dtype, values.shape[1], choices)
    rows = Rows(layout.pack(values, routing.weights_TK, experts_TK, *scales), gradient, routing.weights_TK)
    # The experts that can be reached from here: all of them, then after each hop a share.
    first, count = 0, num_experts or routing.stats.load_E.size
    fill, trail = jnp.zeros((), jnp.float32), []
    for hop in hops:
        experts_TK = layout.experts(rows.bits[0]) if trail else experts_TK
        count //= hop.devices
        plan, fullest = lax.optimization_barrier(hop.plan((experts_TK - first) // count))  # or XLA counts again for each element it moves
        rows = _out(hop, layout, plan, rows)
        first = first + count * lax.axis_index(hop.axes)
        fill = jnp.maximum(fill, fullest)
        trail.append((hop, plan))
    rows = rows._replace(**keep({"bits": rows.bits, "weights_TK": rows.weights_TK}, "dispatched"))

    here_TM, weights_TM = _here(layout.experts(rows.bits[0]) - first, rows.weights_TK, count)
    sort, fullest = lax.optimization_barrier(_sort(here_TM, count, min(here_TM.size, sorted_room or here_TM.size)))
    weights_R = _weights_of_rows(weights_TM, sort.choice_R, sort.places_TM)
    y_RD = experts(_to_experts(layout, sort, rows.bits[0], rows.gradient), sort.group_sizes_E, weights_R)

    y_TD = _from_experts(sort, y_RD)
    for hop, plan in reversed(trail):
        y_TD = _back(hop, plan, y_TD)
    return y_TD, jnp.maximum(fill, fullest)


def _here(expert_TK: jax.Array, weights_TK: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Of the experts that rows chose, those on this device, 0 to count-1 (count: none), with their weights: [T, min(K, count)]."""
    if count >= expert_TK.shape[1]:
        return jnp.where((expert_TK >= 0) & (expert_TK < count), expert_TK, count), weights_TK
    is_TKE = expert_TK[..., None] == jnp.arange(count)
    return jnp.where(jnp.any(is_TKE, axis=1), jnp.arange(count), count), jnp.sum(jnp.where(is_TKE, weights_TK[..., None], 0), axis=1)
