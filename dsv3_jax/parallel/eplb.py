"""Expert-parallel load balancing: which experts get copies, and on which GPU each copy lives. numpy only.

A model with E routed experts runs with R >= E replicas ("physical experts"), R / GPUs on each GPU; the replicas of an expert share its
load evenly. `rebalance_experts` makes the plan of DeepSeek's EPLB (github.com/deepseek-ai/EPLB): hierarchical where the expert groups
divide over the nodes, so that the groups of a token lie on few nodes; global otherwise. A fresh plan moves nearly every expert's weights,
so with `previous`, the plan in use, that one is changed instead, by as few moves as make it nearly as even.

Shapes: L layers, E experts, R replicas, X the most copies an expert has; S slots, a slice of the R.
"""

import numpy as np

MAX_MOVED = 0.25  # a changed plan moves at most this part of a layer's replicas,
CLOSE_TO_FRESH = 1.04  # and moves none once its fullest GPU has this times the load of a fresh plan's


def rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus, *, previous=None):
    """A plan for the loads `weight` [L, E]: tokens per expert in any unit, not negative.

    num_groups: expert groups of the router. num_nodes, num_gpus: of the whole deployment; replica r lives on GPU r // (R / num_gpus).
    previous: the phy2log [L, R] in use. At most a quarter of each layer's replicas then moves, and those that stay keep their index.

    Returns int64 arrays (phy2log [L, R]: the expert of each replica; log2phy [L, E, X]: the replicas of each expert, padded with -1;
    logcnt [L, E]: how many they are). Raises ValueError for loads that are negative or not finite, sizes that do not divide, and a
    `previous` that is no plan for these sizes.
    """
    weight = np.asarray(weight, np.float32)
    _check_sizes(weight, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:  # global
        num_groups = num_nodes = 1
    phy2log = _fresh_plan(weight, num_replicas, num_groups, num_nodes, num_gpus)
    if previous is not None:
        previous = np.asarray(previous)
        _check_previous(previous, weight, num_replicas, num_groups, num_nodes)
        phy2log = _changed_plan(weight, previous, phy2log, num_groups, num_nodes, num_gpus)
    return phy2log, *index(phy2log, weight.shape[1])


def index(phy2log, num_experts):
    """(log2phy, logcnt) of a plan."""
    logcnt = _count(phy2log, num_experts)
    replicas = np.argsort(phy2log, axis=1, kind="stable")  # expert by expert
    experts = np.take_along_axis(phy2log, replicas, 1)
    first = logcnt.cumsum(1) - logcnt
    copy = np.arange(phy2log.shape[1]) - np.take_along_axis(first, experts, 1)
    log2phy = np.full((*logcnt.shape, logcnt.max()), -1, np.int64)
    log2phy[np.arange(len(phy2log))[:, None], experts, copy] = replicas
    return log2phy, logcnt


def imbalance(weight, phy2log, num_gpus):
    """[L]: load of the fullest GPU over the mean of all. 1 is even; also 1 for a layer without load."""
    load = np.stack([_gpu_loads(*layer, num_gpus) for layer in zip(np.asarray(weight, np.float64), phy2log)])
    mean = load.mean(1)
    return np.where(mean > 0, load.max(1) / np.where(mean > 0, mean, 1), 1)


def moved_replicas(previous, phy2log, num_gpus):
    """[L]: replicas of the plan `phy2log` whose GPU did not hold their expert in the plan `previous`: their weights have to be sent."""
    layers, replicas = phy2log.shape
    held = [_count(np.asarray(plan).reshape(layers * num_gpus, -1), phy2log.max() + 1) for plan in (previous, phy2log)]
    return replicas - np.minimum(*held).sum(1).reshape(layers, num_gpus).sum(1)


def moved_bytes(previous, phy2log, num_gpus, bytes_per_expert):
    """Bytes of weights that the change of plan sends between GPUs, all layers together."""
    return int(moved_replicas(previous, phy2log, num_gpus).sum()) * bytes_per_expert


def moving_average(average, load, *, decay=0.9):
    """The load to plan for: `average` [L, E] of the intervals before (None at the start) moved towards the last interval's `load`."""
    load = np.asarray(load, np.float64)
    return load if average is None else decay * average + (1 - decay) * load


def _check_sizes(weight, num_replicas, num_groups, num_nodes, num_gpus):
    if weight.ndim != 2 or not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError("weight must be loads [layers, experts], finite and not negative")
    experts = weight.shape[1]
    if num_replicas < experts:
        raise ValueError(f"{num_replicas} replicas cannot hold {experts} experts: use at least {experts}")
    for a, b, names in (
        (experts, num_groups, "experts, groups"),
        (num_gpus, num_nodes, "GPUs, nodes"),
        (num_replicas, num_gpus, "replicas, GPUs"),
    ):
        if b < 1 or a % b:
            many, few = names.split(", ")
            raise ValueError(f"{a} {many} do not divide evenly over {b} {few}")


def _check_previous(previous, weight, num_replicas, num_groups, num_nodes):
    layers, experts = weight.shape
    if previous.shape != (layers, num_replicas):
        raise ValueError(f"previous has shape {previous.shape}, not ({layers}, {num_replicas}): plan afresh, with previous=None")
    if previous.min() < 0 or previous.max() >= experts or (_count(previous, experts) == 0).any():
        raise ValueError(f"previous does not hold every one of {experts} experts: plan afresh, with previous=None")
    nodes = np.arange(num_replicas) // (num_replicas // num_nodes)
    nodes_of_group = np.zeros((layers, num_groups, num_nodes), bool)
    nodes_of_group[np.arange(layers)[:, None], previous // (experts // num_groups), nodes] = True
    if (nodes_of_group.sum(2) > 1).any():
        raise ValueError(f"previous spreads a group over several of {num_nodes} nodes: plan afresh, with previous=None")


def _count(experts, num_experts):
    """[N, S] -> [N, E]: how often each expert occurs in a row."""
    counts = np.zeros((len(experts), num_experts), np.int64)
    np.add.at(counts, (np.arange(len(experts))[:, None], experts), 1)
    return counts


# A fresh plan. Every row (a layer, or a node of a layer) is worked on at once; sums are float32, as upstream, for equal plans.


def _fresh_plan(weight, num_replicas, num_groups, num_nodes, num_gpus):
    """Groups to nodes, then copies within each node, then replicas to the GPUs of the node."""
    layers, num_experts = weight.shape
    group_size = num_experts // num_groups
    groups = _pack(weight.reshape(layers, num_groups, group_size).sum(2), num_nodes)
    experts = (groups[:, :, None] * group_size + np.arange(group_size)).reshape(layers, num_experts)  # node by node
    weight = np.take_along_axis(weight, experts, 1).reshape(layers * num_nodes, -1)
    replicas = _replicate(weight, num_replicas // num_nodes)
    share = weight / _count(replicas, weight.shape[1]).astype(np.float32)
    order = _pack(np.take_along_axis(share, replicas, 1), num_gpus // num_nodes)
    replicas = np.take_along_axis(replicas, order, 1)
    return np.take_along_axis(experts.reshape(weight.shape), replicas, 1).reshape(layers, num_replicas)


def _pack(weight, num_packs):
    """The items of each row [N, S], ordered so that the first S / num_packs are pack 0, and so on: the heaviest item first, each into the
    lightest pack with room."""
    rows, size = np.arange(len(weight)), weight.shape[1]
    room = size // num_packs
    if room == 1:
        return np.broadcast_to(np.arange(size), weight.shape)
    packed = np.empty(weight.shape, np.int64)
    load = np.zeros((len(weight), num_packs), np.float32)
    held = np.zeros((len(weight), num_packs), np.int64)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        pack = np.where(held < room, load, np.inf).argmin(1)
        packed[rows, pack * room + held[rows, pack]] = item
        load[rows, pack] += weight[rows, item]
        held[rows, pack] += 1
    return packed


def _replicate(weight, num_replicas):
    """[N, E] -> [N, num_replicas]: each expert once, then again and again the one with the most load per copy."""
    rows, num_experts = np.arange(len(weight)), weight.shape[1]
    replicas = np.empty((len(weight), num_replicas), np.int64)
    replicas[:, :num_experts] = np.arange(num_experts)
    copies = np.ones(weight.shape, np.float32)
    for i in range(num_experts, num_replicas):
        replicas[:, i] = (weight / copies).argmax(1)
        copies[rows, replicas[:, i]] += 1
    return replicas


# A changed plan: a search for each layer, `weight` [E] float64, `plan` or `replicas` [S] the experts of some slots.


def _changed_plan(weight, previous, fresh, num_groups, num_nodes, num_gpus):
    """Moves single replicas within their nodes; where that is not enough, because the nodes themselves differ, two groups change places."""
    result = np.empty_like(fresh)
    budget = int(MAX_MOVED * fresh.shape[1])
    for layer, load in enumerate(weight.astype(np.float64)):
        old = previous[layer].astype(np.int64)
        limit = CLOSE_TO_FRESH * _fullest(load, fresh[layer], num_gpus)
        plans = [_even_out(load, old, old, num_nodes, num_gpus, limit, budget)]
        if num_nodes > 1 and _fullest(load, plans[0], num_gpus) > limit:
            for swapped in _group_swaps(load, old, num_groups, num_nodes, num_gpus, budget):
                plans.append(_even_out(load, old, swapped, num_nodes, num_gpus, limit, budget))
        result[layer] = min(plans, key=lambda plan, load=load: _fullest(load, plan, num_gpus))
    return result


def _share(weight, plan):
    """[E]: load of one copy of each expert; its whole load where there is none."""
    return weight / np.maximum(np.bincount(plan, minlength=len(weight)), 1)


def _gpu_loads(weight, plan, num_gpus):
    return _share(weight, plan)[plan].reshape(num_gpus, -1).sum(1)


def _fullest(weight, plan, num_gpus):
    return _gpu_loads(weight, plan, num_gpus).max()


def _group_swaps(weight, plan, num_groups, num_nodes, num_gpus, budget):
    """The plans with two groups of two nodes exchanged that leave less load on the fullest node and keep within the budget."""
    group_size = len(weight) // num_groups
    group = plan // group_size
    slots = np.bincount(group, minlength=num_groups)
    node = np.empty(num_groups, np.int64)
    node[group] = np.arange(len(plan)) // (len(plan) // num_nodes)
    load = weight.reshape(num_groups, group_size).sum(1)
    for a, b in zip(*np.triu_indices(num_groups, 1)):
        swapped = node.copy()
        swapped[[a, b]] = node[[b, a]]
        less = np.bincount(swapped, load).max() < np.bincount(node, load).max()
        if less and slots[a] + slots[b] <= budget:
            yield _swap_groups(weight, plan, group, a, b, num_gpus)


def _swap_groups(weight, plan, group, a, b, num_gpus):
    """Each of two groups takes the other's slots: copies as in a fresh plan, the heaviest first to the GPU with the least load so far."""
    result = plan.copy()
    slots_per_gpu = len(plan) // num_gpus
    group_size = len(weight) // (group.max() + 1)
    for leaves, enters in ((a, b), (b, a)):
        load = np.where(group == leaves, 0, _share(weight, plan)[plan]).reshape(num_gpus, -1).sum(1)
        free = list(np.flatnonzero(group == leaves))
        first = enters * group_size
        entering = first + _replicate(weight[None, first : first + group_size], len(free))[0]
        share = _share(weight, entering)
        for expert in entering[np.argsort(-share[entering], kind="stable")]:
            held = (result.reshape(num_gpus, -1) == expert).any(1)  # a second copy on a GPU helps nobody
            slot = min(free, key=lambda slot, held=held: (held[slot // slots_per_gpu], load[slot // slots_per_gpu]))
            free.remove(slot)
            result[slot] = expert
            load[slot // slots_per_gpu] += share[expert]
    return result


def _even_out(weight, old, plan, num_nodes, num_gpus, limit, budget):
    """`plan` with single replicas moved within each node until no GPU has more than `limit`, at most `budget` moved since `old`.

    Where copies and exchanges one by one do not get there, it starts again from better numbers of copies.
    """
    result = []
    left = budget - np.count_nonzero(plan != old)
    gpus = num_gpus // num_nodes
    for before, replicas in zip(old.reshape(num_nodes, -1), plan.reshape(num_nodes, -1)):
        allowed = left + np.count_nonzero(replicas != before)
        plans = [_descend(weight, before, replicas, gpus, limit, allowed)]
        if _fullest(weight, plans[0], gpus) > limit:
            plans.append(_descend(weight, before, _recount(weight, before, replicas, gpus, allowed), gpus, limit, allowed))
        result.append(min(plans, key=lambda plan: _fullest(weight, plan, gpus)))
        left = allowed - np.count_nonzero(result[-1] != before)
    return np.concatenate(result)


def _recount(weight, before, replicas, num_gpus, budget):
    """Gives copies of the experts that miss them least to those with the most load per copy, while that lowers the most."""
    replicas = replicas.copy()
    gpu = np.arange(len(replicas)) // (len(replicas) // num_gpus)
    while np.count_nonzero(replicas != before) < budget:
        copies = np.bincount(replicas, minlength=len(weight))
        share = np.where(copies > 0, _share(weight, replicas), 0)
        without = np.where(copies > 1, weight / np.maximum(copies - 1, 1), np.inf)
        gains, loses = share.argmax(), without.argmin()
        if without[loses] >= share[gains]:
            break
        load = _gpu_loads(weight, replicas, num_gpus)
        load[gpu[replicas == gains]] = np.inf  # again no second copy on a GPU
        slot = min(np.flatnonzero(replicas == loses), key=lambda slot, load=load: load[gpu[slot]])
        if load[gpu[slot]] == np.inf:
            break
        replicas[slot] = gains
    return replicas


def _descend(weight, before, replicas, num_gpus, limit, budget):
    """`replicas`, changed step by step until no GPU has more than `limit`; at most `budget` of them differ from `before`.

    A step exchanges a replica of the fullest GPU with one of another, or makes one more copy of an expert of the fullest GPU, elsewhere,
    in place of an expert with several. It is the step that lowers sum(load ** 16) most per replica moved: nearly the maximum, but the
    other GPUs close to it count too.
    """
    replicas = replicas.copy()
    gpu = np.arange(len(replicas)) // (len(replicas) // num_gpus)
    mean = _gpu_loads(weight, replicas, num_gpus).mean()

    def power(load):
        return ((((load / mean) ** 2) ** 2) ** 2) ** 2

    while True:
        copies = np.bincount(replicas, minlength=len(weight))
        share = _share(weight, replicas)
        held = np.zeros((len(weight), num_gpus), np.int64)
        np.add.at(held, (replicas, gpu), 1)
        load = share @ held
        full = load.argmax()
        if load[full] <= limit:
            return replicas
        changed = (replicas != before).astype(np.int64)
        left = budget - changed.sum()

        # slot i of the fullest GPU, of expert a, with slot j, of expert b: both [slots of a GPU, slots]
        i, j = np.meshgrid(np.flatnonzero(gpu == full), np.arange(len(replicas)), indexing="ij")
        a, b = replicas[i], replicas[j]

        shift = share[a] - share[b]
        gain = power(load[full]) + power(load[gpu[j]]) - power(load[full] - shift) - power(load[gpu[j]] + shift)
        moves = (b != before[i]).astype(np.int64) + (a != before[j]) - changed[i] - changed[j]
        allowed = (shift > 0) & (held[a, gpu[j]] == 0) & (held[b, full] == 0) & (moves <= left)
        exchange = np.where(allowed, gain / np.maximum(moves, 0.5), 0)

        more, fewer = weight[a] / (copies[a] + 1), weight[b] / np.maximum(copies[b] - 1, 1)  # what a copy has afterwards
        after = load + held[a] * (more - share[a])[..., None] + held[b] * (fewer - share[b])[..., None]
        after += np.where(np.arange(num_gpus) == gpu[j][..., None], (more - fewer)[..., None], 0)
        gain = power(load).sum() - power(after).sum(-1)
        moves = (a != before[j]).astype(np.int64) - changed[j]
        allowed = (copies[b] > 1) & (fewer <= share[replicas].max()) & (held[a, gpu[j]] == 0) & (moves <= left)
        copy = np.where(allowed, gain / np.maximum(moves, 0.5), 0)

        best = max(exchange.max(), copy.max())
        if best <= 1e-6 * power(load).sum():  # none helps; rounding must not keep it going
            return replicas
        if best == copy.max():
            step = copy.argmax()
            replicas[j.flat[step]] = a.flat[step]
        else:
            step = exchange.argmax()
            replicas[[i.flat[step], j.flat[step]]] = b.flat[step], a.flat[step]
