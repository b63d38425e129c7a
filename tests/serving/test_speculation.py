"""Speculation with the MTP module changes no token; the FP8 cache changes log-probabilities by little.

With random weights a draft is never right. The model here has weak layers and an MTP module that mostly hands the embedding of the newest
token on: it repeats what the main model does without its layers, and is right often, not always.
"""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import Decoder
from dsv3_jax.serving import Engine, Request, SamplingParams, runner
from dsv3_jax.serving.runner import Runner
from tests import draw


def make(model, *, free_pages=16, **options):
    engine = Engine(model.decoder, model.params, **dict(max_length=256, num_pages=16, max_batch=8, prefill_tokens=64) | options)
    for _ in range(16 - free_pages):  # a smaller pool would be other programs to compile
        engine.pool.allocate()
    return engine


@pytest.fixture(scope="module")
def model(with_mtp):
    def weaken(path, x):
        return x * 0.1 if {"o_proj", "down_proj"} & {key.key for key in path} else x

    params = jax.tree_util.tree_map_with_path(weaken, with_mtp.params)
    size = with_mtp.config.hidden_size
    params["lm_head"] = params["lm_head"] * 20  # probabilities far from equal
    params["mtp"] = params["mtp"] | {"eh_proj": np.concatenate([np.eye(size), np.zeros((size, size))], axis=1, dtype=np.float32)}
    params = jax.device_put(params, jax.devices()[0])  # as `load` gives them: the same programs as those of `with_mtp`
    return SimpleNamespace(decoder=with_mtp.decoder, params=params, prompts=with_mtp.ids200[0])


def answers(model, params, prompts, **options):
    engine = make(model, **options)
    free = engine.pool.num_free
    tokens = [completion.tokens for completion in engine.generate(prompts, params)]
    assert engine.pool.num_free == free
    return tokens, engine


GREEDY = SamplingParams(max_new_tokens=80, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=80, temperature=1.0, top_p=0.9, seed=5, ignore_eos=True)


# The first of this file: what others have compiled would hide what this leaves out.
def test_all_shapes_are_compiled_at_the_start(model, monkeypatch):
    launched = []
    launch = Runner._launch

    def record(runner, inputs, **options):
        launched.append((inputs.fields.tokens.shape, inputs.fields.page_table.shape, options["chunk"]))
        return launch(runner, inputs, **options)

    monkeypatch.setattr(Runner, "_launch", record)
    engine = make(model, speculate=3)
    progress = list(engine.compile())
    assert progress == [(i, len(progress)) for i in range(1, len(progress) + 1)]
    compiled = set(launched)
    assert len(compiled) == len(launched), "a shape is run twice"
    programs = [program._cache_size() for program in (runner._forward, runner._draft, runner._pick)]
    launched.clear()
    engine.generate([model.prompts[:n].tolist() for n in (1, 20, 50, 64, 65, 150)], dataclasses.replace(GREEDY, max_new_tokens=20))
    assert len(set(launched)) > 2 and set(launched) <= compiled
    assert [program._cache_size() for program in (runner._forward, runner._draft, runner._pick)] == programs


# One draft: test_oracle_tokens_with_speculation.
@pytest.mark.parametrize("drafts", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("params", [pytest.param(GREEDY, marks=pytest.mark.slow), DRAWN], ids=["greedy", "drawn"])
def test_answers_are_the_same_with_and_without(model, params, drafts):
    prompts = [model.prompts[i : i + 30 + 11 * i].tolist() for i in range(6)]
    expected, _ = answers(model, params, prompts)
    for options in (dict(), dict(free_pages=5)):
        tokens, engine = answers(model, params, prompts, speculate=drafts, **options)
        assert tokens == expected
        parts = engine.stats.acceptance
        assert 0.1 < parts[0] < 0.99 and parts[-1] > 0.01, "the test needs drafts of both kinds"
        assert engine.stats.generated_tokens == 6 * 80
        assert (engine.scheduler.num_preemptions > 0) == ("free_pages" in options)


def test_drafts_are_those_of_whole_passes(model, with_mtp):
    """Those after the first, too, which the MTP module makes of its own state: no acceptance tells whether that is done right."""
    decoder = Decoder(dataclasses.replace(model.decoder.config, mtp_hidden="pre_norm"))  # its `mtp` takes states that are normed already

    @jax.jit
    def whole(params, tokens_1S, length):
        states_1SD, next_1S = decoder.final_norm(params, decoder(params, tokens_1S).hidden_BSD), jnp.roll(tokens_1S, -1, axis=1)
        drafts = []
        for place in (length - 2, length - 1, length):
            out_1SD, _ = decoder.mtp(params, states_1SD, next_1S)
            drafts.append(jnp.argmax(decoder.head(params, out_1SD[:, place])))
            states_1SD, next_1S = states_1SD.at[0, place + 1].set(out_1SD[0, place]), next_1S.at[0, place + 1].set(drafts[-1])
        return jnp.stack(drafts)

    for params in (model.params, with_mtp.params):  # drafts that are often right, and such as depend on everything
        engine = make(SimpleNamespace(decoder=model.decoder, params=params), speculate=3)
        request = Request(model.prompts[:60].tolist(), dataclasses.replace(GREEDY, max_new_tokens=30))
        engine.add(request)
        while engine.has_work:
            if engine.step() and request.finish_reason is None:
                tokens = np.zeros((1, 96), np.int32)
                tokens[0, : len(request.tokens)] = request.tokens
                assert request.drafts == whole(params, tokens, len(request.tokens)).tolist()


def test_oracle_tokens_with_speculation(with_mtp):
    tokens, _ = answers(with_mtp, dataclasses.replace(GREEDY, max_new_tokens=32), with_mtp.prompts.tolist(), speculate=1)
    assert tokens == with_mtp.greedy_tokens.tolist()


def test_a_stop_text_ends_an_answer_within_a_step(model, with_mtp):
    """Each answer at another place; what a step has drawn beyond it is neither in the answer nor counted."""
    prompt = model.prompts[:30].tolist()
    (whole,), _ = answers(model, [DRAWN], [prompt])
    stops = [with_mtp.tokenizer.decode([token]) for token in whole[10:]]
    stops = [text for text in dict.fromkeys(stops) if text.isprintable() and "\ufffd" not in text][:16]
    found = []
    for drafts in (0, 3):
        engine = make(model, tokenizer=with_mtp.tokenizer, speculate=drafts)
        completions = engine.generate([prompt] * len(stops), [dataclasses.replace(DRAWN, stop=(text,)) for text in stops])
        found.append([(completion.text, completion.tokens, completion.finish_reason) for completion in completions])
        assert engine.stats.generated_tokens == sum(len(completion.tokens) for completion in completions)
    assert found[0] == found[1] and len(stops) == 16 and {reason for *_, reason in found[0]} == {"stop"}


def test_requests_with_penalties_do_not_speculate(model):
    params = [dataclasses.replace(GREEDY, frequency_penalty=1.0), GREEDY]
    prompts = [model.prompts[:20].tolist()] * 2
    expected, _ = answers(model, params, prompts)
    tokens, engine = answers(model, params, prompts, speculate=3)
    assert tokens == expected and tokens[0] != tokens[1] and engine.stats.accepted > 0


def test_speculative_draws_follow_the_distribution(model):
    """Three tokens of two choices each, against the product of their probabilities."""
    prompt, draws = model.prompts[:20].tolist(), 300
    params = [SamplingParams(max_new_tokens=3, temperature=1.5, top_k=2, seed=seed, ignore_eos=True) for seed in range(draws)]
    tokens, engine = answers(model, params, [prompt] * draws, speculate=3)
    assert engine.stats.accepted > 15
    seen, expected = {}, {(): 1.0}
    for answer in tokens:
        seen[tuple(answer)] = seen.get(tuple(answer), 0) + 1
    logits_of = jax.jit(model.decoder.logits)
    for length in range(3):
        longer = {}
        for answer, probability in expected.items():
            row = np.zeros((1, 23), np.int32)
            row[0, : 20 + length] = prompt + list(answer)
            logits = np.asarray(logits_of(model.params, row))[0, 19 + length] / 1.5
            pair = np.argsort(-logits)[:2]
            chances = np.exp(logits[pair]) / np.exp(logits[pair]).sum()
            longer |= {(*answer, int(token)): probability * chance for token, chance in zip(pair, chances)}
        expected = longer
    assert set(seen) <= set(expected)
    for answer, probability in expected.items():  # five standard deviations of a binomial
        assert abs(seen.get(answer, 0) / draws - probability) <= 5 * np.sqrt(probability * (1 - probability) / draws) + 1e-9


def test_fp8_cache_is_near(with_mtp):
    config = dataclasses.replace(with_mtp.config, kv_lora_rank=512, qk_rope_head_dim=64)
    decoder = Decoder(config)
    wide = SimpleNamespace(decoder=decoder, params=draw.parameters(decoder))
    wide.params["lm_head"] = wide.params["lm_head"] * 20
    prompts = [with_mtp.ids200[0, i : i + 60].tolist() for i in range(0, 120, 20)]
    params = dataclasses.replace(GREEDY, max_new_tokens=8, logprobs=20)
    exact, near = (make(wide, fp8_cache=fp8, max_batch=1).generate(prompts, params) for fp8 in (False, True))
    differences, spread = [], []
    for a, b in zip(exact, near):
        for x, y in itertools.takewhile(lambda pair: pair[0].token == pair[1].token, zip(a.logprobs, b.logprobs)):
            differences += [abs(dict(y.top)[token] - value) for token, value in x.top if token in dict(y.top)]
            spread.append(x.top[0][1] - x.top[-1][1])
    assert len(differences) > 300 and 0 < np.mean(differences) < 0.03 * np.mean(spread), (np.mean(differences), np.mean(spread))


def test_speculation_reports_its_acceptance(model):
    _, engine = answers(model, GREEDY, [model.prompts[:20].tolist()], speculate=1)
    stats = engine.stats
    # The first token comes from the prefill; each draft adds one token, and one more if it is accepted.
    assert stats.generated_tokens - 1 in (stats.drafted + stats.accepted, stats.drafted + stats.accepted - 1)
