"""The engine on meshes of fake devices: the tokens of one device, whatever is spread where."""

import dataclasses

import jax
import numpy as np
import pytest

import dsv3_jax
from dsv3_jax.errors import UserError
from dsv3_jax.parallel import eplb
from dsv3_jax.parallel import mesh as meshes
from dsv3_jax.serving import Engine, SamplingParams, balance, runner
from dsv3_jax.serving import engine as engine_module
from dsv3_jax.serving.balance import check
from dsv3_jax.serving.cache import Transfer
from dsv3_jax.serving.host import HostPages
from dsv3_jax.serving.ranks import Ranks

GREEDY = SamplingParams(max_new_tokens=32, temperature=0, ignore_eos=True)


def mesh_of(text):
    sizes = meshes.parse(text)
    return meshes.make(text, jax.devices()[: np.prod(list(sizes.values()))])


def make(model, mesh, *, free_pages=None, **options):
    """An engine of 16 pages of which others hold all but `free_pages` of each rank (a pool of another size is another program)."""
    options = dict(max_length=256, num_pages=16, max_batch=8, prefill_tokens=64) | options
    engine = Engine(model.decoder, model.params, mesh=mesh_of(mesh), **options)
    pool = engine.pool
    for rank in range(pool.num_ranks if free_pages else 0):
        for _ in range(pool.pages_per_rank - free_pages):
            pool.allocate(rank)
    return engine


# Quick are: `data=2` alone, test_prefixes_come_back_from_the_host; `expert=2`, test_an_fp8_checkpoint_is_served_as_it_is_stored; both,
# with drafts, the test after this one.
@pytest.mark.slow
@pytest.mark.parametrize("name, mesh", [("tiny_s_plain", "expert=2"), ("tiny_s_yarn_mtp", "data=2,expert=2")])
def test_greedy_tokens_equal_the_oracles(oracle, name, mesh):
    model = oracle(name)
    engine = make(model, mesh, speculate=2 if "mtp" in name else 0)
    answers = [completion.tokens for completion in engine.generate(model.prompts.tolist(), GREEDY)]
    assert answers == model.greedy_tokens.tolist()
    assert engine.pool.num_free == engine.pool.num_pages


@pytest.mark.parametrize("name", ["tiny_s_yarn_mtp"])
def test_experts_change_place_while_requests_run_and_no_token_changes(oracle, name):
    model = oracle(name)
    engine = make(model, "data=2,expert=2", speculate=2, redundant_experts=4, rebalance_steps=5)
    first, balancer = engine.balancer.plan.copy(), engine.balancer
    prompts = model.prompts.tolist()
    answers = [completion.tokens for completion in engine.generate(prompts, GREEDY)]
    compiled = runner._forward._cache_size()
    answers += [completion.tokens for completion in engine.generate(prompts, GREEDY)]
    assert answers == 2 * model.greedy_tokens.tolist() and engine.pool.num_free == engine.pool.num_pages
    assert runner._forward._cache_size() == compiled, "a change of place compiled something again"
    assert balancer.stats.plans >= 2 and (balancer.plan != first).any()
    load = balancer._average
    assert eplb.imbalance(load, balancer.plan, 2).mean() < eplb.imbalance(load, first, 2).mean()
    assert balancer.stats.moved_replicas >= 2 * eplb.moved_replicas(first, balancer.plan, 2).sum() > 0  # twice: data=2
    # Every slot holds the weights of the expert that the plan names.
    stacked = model.decoder.decode_params(model.params)["moe_layers"]
    for layer, (params, plan) in enumerate(zip(engine.runner.params["moe_layers"], balancer.plan)):
        for leaf in ("gate_up_proj", "down_proj"):
            np.testing.assert_array_equal(params["mlp"]["experts"][leaf], np.asarray(stacked[layer]["mlp"]["experts"][leaf])[plan])


@pytest.mark.parametrize("mesh", ["data=1", "data=2"])
def test_prefixes_come_back_from_the_host(plain, mesh):
    """Six prompts of two full pages each go round a pool that holds few of them: the second time their latents come from the host.

    The tokens are those of one device that computes everything, whose own are the oracle's (test_engine.py).
    """
    prompts = [plain.ids200[0, i : i + 131].tolist() for i in range(6)]
    params = dataclasses.replace(GREEDY, max_new_tokens=8)
    without, engine = make(plain, "data=1", free_pages=4), make(plain, mesh, free_pages=4, host_pages=20)
    expected = [without.generate([prompt], params)[0].tokens for prompt in prompts]
    for rounds in range(3):
        computed = engine.stats.prompt_tokens
        assert [engine.generate([prompt], params)[0].tokens for prompt in prompts] == expected
        assert engine.stats.prompt_tokens - computed == 6 * (131 if rounds == 0 else 3)
    assert engine.scheduler.host_hits > 128 * 8 and engine.pool.num_free == 4 * engine.pool.num_ranks


def test_a_preempted_request_comes_back_from_the_host(plain):
    prompts = [plain.ids200[0, i : i + 70 + i].tolist() for i in range(4)]
    params = dataclasses.replace(GREEDY, max_new_tokens=160)
    expected = [c.tokens for c in make(plain, "data=1").generate(prompts, params)]
    tight, swapping = make(plain, "data=1", free_pages=4), make(plain, "data=1", free_pages=4, host_pages=30)
    for engine in (tight, swapping):
        assert [c.tokens for c in engine.generate(prompts, params)] == expected
        assert engine.scheduler.num_preemptions > 0
    assert swapping.stats.prompt_tokens < tight.stats.prompt_tokens
    assert swapping.scheduler.host_hits > 0


def test_a_host_tier_smaller_than_one_prompt_changes_nothing(plain):
    prompts = [plain.ids200[0, i : i + 195].tolist() for i in range(3)]
    params = dataclasses.replace(GREEDY, max_new_tokens=8)
    engine = make(plain, "data=1", free_pages=4, host_pages=2)
    expected = [make(plain, "data=1").generate([prompt], params)[0].tokens for prompt in prompts]
    for _ in range(3):
        assert [engine.generate([prompt], params)[0].tokens for prompt in prompts] == expected


def test_a_host_slot_holds_what_was_put_there_last():
    """More pages of one rank than a copy takes, and a slot that both ranks use: what comes back from it is the later one's."""
    ranks, value = Ranks.of(mesh_of("data=2")), np.random.default_rng(0).standard_normal((1, 40, 2, 3), np.float32)
    caches = {"x": jax.device_put(value, ranks.sharding(ranks.pages))}
    host = HostPages(caches, 17, ranks)
    out = [Transfer(page, slot, to_host=True) for page, slot in [*zip(range(17), range(17)), (20, 16), (21, 0)]]
    back = [Transfer(page, slot, to_host=False) for page, slot in ((38, 16), (39, 0), (19, 1))]
    found = np.asarray(host.run(caches, [*out, *back])["x"])
    np.testing.assert_array_equal(found[:, [38, 39, 19]], value[:, [20, 21, 1]])


def test_an_fp8_checkpoint_is_served_as_it_is_stored(oracle):
    """Straight from the files to the devices that use it: codes stay codes, experts are spread out, and the tokens are the oracle's."""
    model, mesh = oracle("tiny_e_fp8_mtp"), mesh_of("expert=2")
    loaded = dsv3_jax.load(model.path, mesh=mesh, serving=True)
    experts = loaded.params["moe_layers"][0]["mlp"]["experts"]
    assert experts["gate_up_proj"].dtype == experts["down_proj"].dtype == jax.numpy.float8_e4m3fn
    assert all(leaf.addressable_shards[0].data.shape[0] == leaf.shape[0] // 2 for leaf in experts.values())
    engine = Engine(loaded.decoder, loaded.params, mesh=mesh, max_length=256, num_pages=16, max_batch=8, prefill_tokens=64, consume=True)
    assert [c.tokens for c in engine.generate(model.prompts.tolist(), GREEDY)] == model.greedy_tokens.tolist()


def test_meshes_that_cannot_serve_are_refused(plain):
    for text, message in [("pipe=2", "pipe=2 is not for serving"), ("expert=2x2", "expert in one piece: expert=4")]:
        with pytest.raises(UserError, match=message):
            Ranks.of(mesh_of(text))
    assert Ranks.of(mesh_of("data=1")) == Ranks.of(None)
    config, spread = plain.config, Ranks.of(mesh_of("expert=4"))
    check(config, spread, 8)
    with pytest.raises(UserError, match="6 redundant experts do not divide over expert=4: the nearest is 8"):
        check(config, spread, 6)
    with pytest.raises(UserError, match="give a mesh with expert=2 or more"):
        check(config, Ranks.of(mesh_of("data=2")), 2)


def test_copies_of_experts_are_made_before_the_cache_takes_what_is_free(oracle, monkeypatch):
    order, model = [], oracle("tiny_s_plain")
    monkeypatch.setattr(balance, "add_slots", lambda *args, add=balance.add_slots: order.append("copies") or add(*args))
    monkeypatch.setattr(engine_module, "memory_for_cache", lambda devices, scratch: order.append("free memory") or 2**20)
    make(model, "expert=2", redundant_experts=2, num_pages=None)
    assert order == ["copies"] * model.config.num_moe_layers + ["free memory"]
