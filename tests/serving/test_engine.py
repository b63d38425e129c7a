"""The engine against the tokens of other software, and against whole forward passes where those end."""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.serving import Engine, Request, SamplingParams, generate
from dsv3_jax.serving.cache import memory_for_cache
from dsv3_jax.serving.runner import Shapes
from dsv3_jax.serving.sampler import Rows

GREEDY = SamplingParams(max_new_tokens=32, temperature=0, ignore_eos=True)
# Engines whose steps look different and whose tokens must not: one after the other; together; prefill in chunks of 5 tokens.
ENGINES = {
    "one by one": dict(max_batch=1),
    "together": dict(),
    "chunked": dict(prefill_tokens=5),
}


def make(model, *, free_pages=16, **options):
    """An engine of 16 pages of which others hold all but `free_pages`: a pool of another size would be another program to compile."""
    options = dict(max_length=256, num_pages=16, max_batch=8, prefill_tokens=64) | options
    engine = Engine(model.decoder, model.params, **options)
    for _ in range(16 - free_pages):
        engine.pool.allocate()
    return engine


def tokens_of(engine, prompts, params):
    free = engine.pool.num_free
    answers = [completion.tokens for completion in engine.generate(prompts, params)]
    assert engine.pool.num_free == free, "pages are missing after all requests ended"
    return answers


logits_of = jax.jit(lambda decoder, params, tokens: decoder.logits(params, tokens), static_argnums=0)


def follows(model, prompt, answer):
    """Whether each token of a greedy answer is the likeliest in one forward pass over prompt and answer."""
    tokens = np.zeros((1, 256), np.int32)  # one shape for all; what follows does not matter
    tokens[0, : len(prompt + answer)] = prompt + answer
    logits = np.asarray(logits_of(model.decoder, model.params, tokens))[0, len(prompt) - 1 :][: len(answer)]
    return np.all(logits[np.arange(len(answer)), answer] > logits.max(axis=-1) - 1e-4)


@pytest.mark.parametrize(
    "name, engine",
    [("tiny_s_plain", engine) for engine in ENGINES] + [("tiny_s_yarn_mtp", "chunked"), ("tiny_e_fp8_mtp", "chunked")],
)
def test_greedy_tokens_equal_the_oracles(oracle, name, engine):
    model = oracle(name)
    assert tokens_of(make(model, **ENGINES[engine]), model.prompts.tolist(), GREEDY) == model.greedy_tokens.tolist()


def test_prompts_across_page_borders(plain):
    """The first token after 63, 64, 65 ... of the oracle's 200 tokens, and its log-probability."""
    lengths = [1, 63, 64, 65, 127, 128, 129, 200]
    params = SamplingParams(max_new_tokens=1, temperature=0, ignore_eos=True, logprobs=3)
    prompts = [plain.ids200[0, :length].tolist() for length in lengths]
    completions = make(plain).generate(prompts, params)
    logprobs = np.asarray(jax.nn.log_softmax(plain.logits_ids200[0], axis=-1))
    for length, completion in zip(lengths, completions):
        expected = logprobs[length - 1]
        (entry,) = completion.logprobs
        assert completion.tokens == [expected.argmax()] == [entry.token] == [entry.top[0][0]]
        np.testing.assert_allclose(entry.logprob, expected.max(), atol=1e-4)
        np.testing.assert_allclose([value for _, value in entry.top], np.sort(expected)[::-1][:3], atol=1e-4)


def test_answers_across_page_borders(plain):
    prompts = [plain.ids200[0, :start].tolist() for start in (10, 50, 63)]
    answers = tokens_of(make(plain), prompts, dataclasses.replace(GREEDY, max_new_tokens=80))
    assert all(len(answer) == 80 and follows(plain, prompt, answer) for prompt, answer in zip(prompts, answers))


def test_preemption_changes_nothing(plain):
    prompts = [plain.ids200[0, i : i + 40 + i].tolist() for i in range(6)]
    params = dataclasses.replace(GREEDY, max_new_tokens=60)
    roomy, tight = make(plain), make(plain, free_pages=4)
    expected = tokens_of(roomy, prompts, params)
    assert tokens_of(tight, prompts, params) == expected
    assert roomy.scheduler.num_preemptions == 0 < tight.scheduler.num_preemptions


def test_a_decode_step_overwrites_what_the_last_one_left(plain):
    """At the same addresses: where they change, a CUDA graph must be brought up to date."""
    engine, places = make(plain), set()
    for prompt in plain.prompts.tolist()[:3]:
        engine.add(Request(prompt, GREEDY))
    while engine.has_work:
        engine.step()
        kept = (*engine.runner._left, engine.runner.load_LE, *engine.runner.caches.values())
        places |= {tuple(array.unsafe_buffer_pointer() for array in kept)} if engine.runner._left else set()
    assert len(places) == 1


def test_a_row_says_what_its_request_does(plain, monkeypatch):
    """Requests that differ come, end and lose their pages, and the rows of some are others' before and after."""
    prompts = [plain.ids200[0, i : i + 20 + 9 * i].tolist() for i in range(12)]
    params = [
        SamplingParams(max_new_tokens=5 + 11 * i % 60, temperature=i % 3 / 2, top_k=i, top_p=1 - i / 30, seed=i, ignore_eos=True)
        for i in range(12)
    ]
    expected = [tokens_of(make(plain, max_batch=1), [prompt], [one])[0] for prompt, one in zip(prompts, params)]
    engine, steps = make(plain, free_pages=9), []

    def told(work, batch, inputs=engine.runner._inputs):
        fields = (step := inputs(work, batch)).fields
        if not work.prefill:
            steps.append(dict(zip(work.requests, batch.rows)))
            assert len(set(batch.rows)) == len(work.requests)
            for request, row in steps[-1].items():
                assert fields.page_table[row, : len(request.pages)].tolist() == request.pages.tolist()
                assert fields.limits[row] == request.max_tokens and fields.may_accept[row] == 1
                np.testing.assert_array_equal(fields.sampling[row], Rows.of([request.params]).packed()[0])
            free = np.setdiff1d(np.arange(len(step.packed)), batch.rows)
            assert np.all(fields.positions[free] == -1) and np.all(fields.lengths[free] == 0) and np.all(fields.source[free] == -1)
        return step

    monkeypatch.setattr(engine.runner, "_inputs", told)
    requests = [Request(prompt, one) for prompt, one in zip(prompts, params)]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert [request.tokens[len(request.prompt) :] for request in requests] == expected
    both = [(before, after) for before, after in itertools.pairwise(steps) if before.keys() & after.keys()]
    assert all(before[request] == after[request] for before, after in both for request in before.keys() & after.keys())
    assert any(set(before.values()) & {after[r] for r in after.keys() - before.keys()} for before, after in both), (
        "no row went on to another"
    )
    assert engine.scheduler.num_preemptions > 0


def test_a_request_that_comes_back_in_the_next_decode_step(plain):
    """It lost its pages while the older one, which is at its last token, could not decode either, and no step came between. It finds the
    other's first page, whose tokens are the same, and its own old first page is its last one now."""
    prompt, engine = plain.ids200[0, :120].tolist(), make(plain, free_pages=4)
    older = Request(prompt[:118], dataclasses.replace(GREEDY, max_new_tokens=11))
    younger = Request(prompt, dataclasses.replace(GREEDY, max_new_tokens=30))
    engine.add(older), engine.add(younger)
    pages = []  # of the younger one, in each of its lives
    while engine.has_work:
        engine.step()
        pages[younger.lives :] = [younger.pages.tolist()]
    assert engine.scheduler.num_preemptions == 1 and pages[1][0] != pages[0][0] == pages[1][-1]
    (expected,) = tokens_of(make(plain), [prompt], dataclasses.replace(GREEDY, max_new_tokens=30))
    assert younger.tokens[120:] == expected


def test_draws_depend_on_the_seed_and_on_nothing_else(plain):
    prompts = [plain.ids200[0, i : i + 30].tolist() for i in range(5)]
    params = SamplingParams(max_new_tokens=40, temperature=1.0, top_p=0.9, min_p=0.01, top_k=50, seed=3, ignore_eos=True)
    expected = tokens_of(make(plain), prompts, params)
    assert tokens_of(make(plain, max_batch=1), prompts, params) == expected
    assert tokens_of(make(plain, free_pages=2), prompts, params) == expected
    other = tokens_of(make(plain), prompts, dataclasses.replace(params, seed=4))
    assert all(a != b for a, b in zip(expected, other))
    same = tokens_of(make(plain), [prompts[0]] * 3, params)
    assert len(set(map(tuple, same))) == 3, "repeated prompts must not repeat their draws"


def test_a_prefix_is_computed_once(plain):
    shared, engine = plain.ids200[0, :130].tolist(), make(plain)
    prompts = [shared + [7, 8, 9], shared + [9, 8], shared, shared[:64]]
    for number, prompt in enumerate(prompts):
        (answer,) = tokens_of(engine, [prompt], GREEDY)
        assert follows(plain, prompt, answer)
        # 128 of 133, 132 and 130 tokens are two full pages; of exactly one page the last token is computed again.
        assert engine.scheduler.prefix_hits == 128 * min(number, 2)
    assert engine.stats.prompt_tokens == 133 + 4 + 2 + 64


def test_text_in_text_out(plain):
    tokenizer, engine = plain.tokenizer, make(plain, tokenizer=plain.tokenizer)
    (full,) = engine.generate(["the quick"], dataclasses.replace(GREEDY, max_new_tokens=12))
    assert full.text == tokenizer.decode(full.tokens) and full.finish_reason == "length"
    stop = full.text[3:5]
    (cut,) = engine.generate(["the quick"], dataclasses.replace(GREEDY, max_new_tokens=12, stop=(stop, "never there")))
    assert cut.text == full.text[: full.text.index(stop)] and cut.finish_reason == "stop"
    assert full.tokens[: len(cut.tokens)] == cut.tokens
    assert engine.pool.num_free == engine.pool.num_pages


def test_the_end_of_sequence_token_ends_an_answer(plain):
    # Without ignore_eos a draw at a high temperature meets it sooner or later.
    params = SamplingParams(max_new_tokens=200, temperature=50.0, seed=0)
    ended = [c for c in make(plain).generate([[5, 6]] * 8, params) if c.finish_reason == "stop"]
    assert ended
    for completion in ended:
        assert completion.tokens.index(plain.config.eos_token_id) == len(completion.tokens) - 1


def test_aborted_requests_give_their_pages_back(plain):
    engine = make(plain)
    requests = [Request(plain.ids200[0, :70].tolist(), GREEDY) for _ in range(3)]
    for request in requests:
        engine.add(request)
    engine.step(), engine.step()
    for request in requests:
        engine.abort(request)
    assert engine.pool.num_free == engine.pool.num_pages
    assert engine.step() == [] and not engine.has_work  # what the device was still at


def test_kinds_of_prompts(plain):
    prompt = plain.prompts[0].tolist()
    expected = plain.greedy_tokens[0].tolist()
    run = lambda prompts: generate(plain.decoder, plain.params, plain.tokenizer, prompts, GREEDY)  # noqa: E731
    assert run(prompt) == expected
    assert run(plain.prompts[0]) == expected
    assert run([prompt]) == [expected]
    assert run([]) == []
    text = run("the quick")
    assert run(["the quick"]) == [text] == [plain.tokenizer.decode(run(plain.tokenizer.encode("the quick")))]


def test_what_cannot_run_is_refused_before_anything_runs(plain):
    engine = make(plain, num_pages=2)
    with pytest.raises(UserError, match="the whole cache holds 128"):
        engine.generate([[5]], SamplingParams(max_new_tokens=200))
    with pytest.raises(UserError, match="at most 256 fit"):
        engine.generate([[5] * 250], SamplingParams(max_new_tokens=7))
    with pytest.raises(UserError, match="prompt is empty"):
        engine.generate([[5], []], GREEDY)
    with pytest.raises(UserError, match=r"outside the vocabulary 0\.\.383"):
        engine.generate([[5, 384]], GREEDY)
    with pytest.raises(UserError, match="no tokenizer"):
        engine.generate(["text"], GREEDY)
    for prompts, words in ((5, "prompts are 5"), ([1.5], "prompt is [1.5]"), ([[5], 5], "prompt is 5"), ([["a"]], "prompt is ['a']")):
        with pytest.raises(UserError, match=re.escape(words)):
            generate(plain.decoder, plain.params, plain.tokenizer, prompts, GREEDY)
    with pytest.raises(UserError, match="max_length is 1000: this model has positions for 512 tokens"):
        make(plain, max_length=1000)
    with pytest.raises(UserError, match="no MTP module"):
        make(plain, speculate=True)
    with pytest.raises(UserError, match="FP8 cache needs kv_lora_rank=512"):
        make(plain, fp8_cache=True)
    assert not engine.has_work


def test_a_prefill_step_has_no_more_rows_than_its_tokens_allow():
    shapes = Shapes.of(max_batch=64, max_length=4096, prefill_tokens=1024)
    assert {w: shapes.prefill_batches(w) for w in shapes.widths} == {64: (1, 8, 16), 256: (1, 4), 1024: (1,)}
    assert shapes._replace(batches=(1, 8), prefill_tokens=4096).prefill_batches(64) == (1, 8)  # there are no more requests


def test_pages_of_the_host_have_to_fit_into_its_memory(plain):
    with pytest.raises(UserError, match="no host memory for 64000000000000 more tokens"):
        make(plain, host_pages=10**12)


def test_a_cache_has_to_fit_into_the_memory(plain, monkeypatch):
    for free, words in ((100_000, r"no memory for a cache of 1024 tokens: \d+ fit beside the weights"), (100, "no memory is left")):
        monkeypatch.setattr("dsv3_jax.serving.engine.memory_for_cache", lambda devices, scratch, free=free: free)
        with pytest.raises(UserError, match=words):
            make(plain)
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": 400})
    assert [memory_for_cache([device], scratch) for scratch in (0, 200, 700)] == [540, 340, 0]


@pytest.mark.parametrize(
    "field, value",
    [("temperature", -1), ("top_p", 0), ("top_p", 1.1), ("top_k", -1), ("min_p", 2), ("max_new_tokens", 0), ("logprobs", 21)]
    + [("temperature", "hot"), ("top_k", 1.5), ("max_new_tokens", "x"), ("seed", "x"), ("stop", 5), ("stop", ("",)), ("logprobs", "all")]
    + [("top_k", 2**31), ("logit_bias", {5: 1.0}), ("logit_bias", ((5, float("nan")),)), ("json_schema", {})],
)
def test_sampling_parameters_are_checked(field, value):
    with pytest.raises(UserError, match=re.escape(f"{field} is {value!r}: it must be ")):
        SamplingParams(**{field: value})
