"""The HTTP face on the loopback: the openai client, clients that misbehave, a fuzzer."""

import asyncio
import contextlib
import json
import logging
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from dsv3_jax.serving import Engine
from dsv3_jax.serving.http import MAX_BODY, listen, make_app
from dsv3_jax.serving.openai import Api

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def running(chatty, **options):
    engine = Engine(chatty.decoder, chatty.params, tokenizer=chatty.tokenizer, max_length=256, num_pages=16, max_batch=8, prefill_tokens=64)
    where = listen("127.0.0.1", 0)
    app = make_app(Api(engine, "tiny"), **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [where]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{where.getsockname()[1]}"
    client = openai.OpenAI(base_url=url + "/v1", api_key=options.get("api_key") or "none", max_retries=0, timeout=120)
    try:
        yield SimpleNamespace(url=url, client=client, engine=engine, worker=app.state.worker)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(chatty):
    with running(chatty) as server:
        list(server.engine.compile())  # a step that compiles would hold everybody up
        yield server
        assert idle(server.engine), "pages are missing after all requests"


def idle(engine):
    return engine.pool.num_free == engine.pool.num_pages and not engine.scheduler.running and not engine.scheduler.waiting


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


ASK = dict(model="tiny", messages=[{"role": "user", "content": "hello"}])


def test_a_completion_is_the_oracles(server, chatty):
    ids = chatty.prompts[0].tolist()
    answer = server.client.completions.create(
        model="tiny", prompt=ids, max_tokens=32, temperature=0, logprobs=3, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == chatty.tokenizer.decode(chatty.greedy_tokens[0].tolist())
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 32
    assert len(answer.choices[0].logprobs.token_logprobs) == 32


def test_a_stream_says_what_the_whole_answer_says(server):
    options = dict(**ASK, max_tokens=40, seed=7, logprobs=True, top_logprobs=2, n=2)
    whole = server.client.chat.completions.create(**options)
    chunks = list(server.client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    for index, choice in enumerate(whole.choices):
        parts = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert parts[-1].finish_reason == choice.finish_reason and all(part.finish_reason is None for part in parts[:-1])
        logprobs = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        # Two runs meet other companions in their batches: equal up to rounding.
        assert [entry.token for entry in logprobs] == [entry.token for entry in choice.logprobs.content]
        assert all(abs(a.logprob - b.logprob) < 1e-4 for a, b in zip(logprobs, choice.logprobs.content))
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_seed_stop_bias_and_penalties(server, chatty):
    ask = lambda **options: server.client.completions.create(model="tiny", prompt="ab", **options).choices[0]  # noqa: E731
    a, b, c = (ask(max_tokens=20, seed=seed).text for seed in (1, 1, 2))
    assert a == b != c
    full = ask(max_tokens=30, temperature=0, extra_body={"ignore_eos": True})
    stop = full.text[5:7]
    cut = ask(max_tokens=30, temperature=0, stop=[stop], extra_body={"ignore_eos": True})
    assert cut.text == full.text.partition(stop)[0] and cut.finish_reason == "stop"
    (token,) = chatty.tokenizer.encode("Z", add_special_tokens=False)
    assert ask(max_tokens=5, logit_bias={str(token): 100}).text == "ZZZZZ"
    # Logits here differ by less than 5; each Z costs 2.
    assert ask(max_tokens=5, temperature=0, logit_bias={str(token): 6}).text == "ZZZZZ"
    assert 1 <= ask(max_tokens=5, temperature=0, logit_bias={str(token): 6}, frequency_penalty=2).text.count("Z") <= 4


def test_json_schemas_hold(server):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    for seed in range(3):
        answer = server.client.chat.completions.create(
            **ASK, max_tokens=60, seed=seed, response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": schema}}
        )
        value = json.loads(answer.choices[0].message.content)
        assert answer.choices[0].finish_reason == "stop"
        assert set(value) == {"a", "b"} and isinstance(value["a"], bool) and value["b"] in ("x", "yy")


def test_tools_and_thoughts_go_through_the_template(server):
    tool = {"type": "function", "function": {"name": "adder", "parameters": {"type": "object"}}}
    ask = lambda **options: server.client.chat.completions.create(**ASK, max_tokens=5, seed=1, **options)  # noqa: E731
    plain, with_tool, not_used = ask(), ask(tools=[tool]), ask(tools=[tool], tool_choice="none")
    assert with_tool.usage.prompt_tokens > plain.usage.prompt_tokens == not_used.usage.prompt_tokens
    thinking = ask(extra_body={"chat_template_kwargs": {"start": "<think>"}})
    assert thinking.choices[0].message.reasoning_content and not thinking.choices[0].message.content


def test_models_health_and_metrics(server):
    (model,) = server.client.models.list().data
    assert model.id == "tiny" and model.max_model_len == 256
    assert server.client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(server.url + "/health").status_code == 200

    def read():
        families = text_string_to_metric_families(httpx.get(server.url + "/metrics").text)
        return {(s.name, s.labels.get("finished_reason")): s.value for f in families for s in f.samples}

    before = read()
    server.client.completions.create(model="tiny", prompt="x" * 100, max_tokens=9, temperature=0, extra_body={"ignore_eos": True})
    after = read()
    grown = {key: value - before.get(key, 0) for key, value in after.items()}
    assert grown["dsv3_jax:generation_tokens_total", None] == 9
    assert grown["dsv3_jax:request_success_total", "length"] == 1
    assert grown["dsv3_jax:time_to_first_token_seconds_count", None] == 1
    assert grown["dsv3_jax:inter_token_latency_seconds_count", None] == 8
    assert after["dsv3_jax:num_requests_running", None] == 0 and after["dsv3_jax:kv_cache_usage_perc", None] == 0


def is_error(response, status):
    error = response.json()["error"]
    assert response.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and "Traceback" not in error["message"]
    return error


def test_refusals_have_openais_shape(server):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        server.client.chat.completions.create(**ASK | {"model": "gpt-4"})
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-4")
    with pytest.raises(openai.BadRequestError, match="at most 256 fit") as caught:
        server.client.completions.create(model="tiny", prompt=[5] * 300)
    assert caught.value.code == "context_length_exceeded"
    post = lambda url="/v1/completions", **options: httpx.post(server.url + url, **options)  # noqa: E731
    assert is_error(post(json={"prompt": "x", "temprature": 1}), 400)["param"] == "temprature"
    is_error(post(content=b"{"), 400)
    is_error(post(content=b"[" * 100_000), 400)
    is_error(post(content=b"\xff\xfe"), 400)
    is_error(post(json=[]), 400)
    is_error(post("/v1/embeddings", json={}), 404)
    is_error(httpx.get(server.url + "/v1/completions"), 405)
    for size in (MAX_BODY + 1, 50 * 2**20):
        assert is_error(post(content=b"x" * size), 413)["code"] == "request_too_large"
    is_error(post(json={"prompt": "x", "chat_template": "{{ ''.__class__ }}"}), 400)


def test_a_template_does_not_reach_python(chatty, server):
    config = chatty.tokenizer.config | {"chat_template": "{{ messages.__class__.__mro__[1].__subclasses__() }}"}
    evil = SimpleNamespace(**vars(chatty) | {"tokenizer": type(chatty.tokenizer)(chatty.tokenizer._json, config)})
    with running(evil) as other:
        assert is_error(httpx.post(other.url + "/v1/chat/completions", json=ASK), 400)["param"] == "messages"


def test_an_api_key_is_asked_for(chatty):
    with running(chatty, api_key="sesame") as server:
        assert server.client.models.list().data
        assert server.client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sesam\xe9".encode("latin-1")}):
            assert is_error(httpx.get(server.url + "/v1/models", headers=headers), 401)["code"] == "invalid_api_key"
            is_error(httpx.post(server.url + "/v1/completions", json={"prompt": "x"}, headers=headers), 401)
        assert httpx.get(server.url + "/health").status_code == 200


LONG = {"prompt": [5], "max_tokens": 250, "ignore_eos": True, "n": 8}


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish_give_their_pages_back(server, stream, monkeypatch):
    """Within a second, on a clock that stands still while this process gets no core: steps of 20 ms. The answers would take 250."""
    step, registry, steps = server.engine.step, server.worker.metrics.registry, []
    monkeypatch.setattr(server.engine, "step", lambda: steps.append(time.sleep(0.02)) or step())
    labels = {"model_name": "tiny", "finished_reason": "abort"}
    aborted = lambda: registry.get_sample_value("dsv3_jax:request_success_total", labels) or 0  # noqa: E731
    before = aborted()
    address = server.url.removeprefix("http://").split(":")
    body = json.dumps(LONG | {"stream": stream}).encode()
    with socket.create_connection((address[0], int(address[1]))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: server.engine.scheduler.running and server.engine.pool.num_free < 16, 30)
        if stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        vanished = len(steps)
    wait_until(lambda: idle(server.engine) and not server.worker._streams, 30)
    assert aborted() - before == 8 and len(steps) - vanished <= 50


def test_a_client_that_vanishes_within_its_body_is_no_error_of_the_server(server, caplog):
    log = logging.getLogger("uvicorn.error")
    log.addHandler(caplog.handler)
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        connection.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"prompt": ')
        time.sleep(0.2)
    time.sleep(0.2)
    log.removeHandler(caplog.handler)
    assert server.client.completions.create(model="tiny", prompt="x", max_tokens=1).choices
    assert not caplog.records, caplog.text


def test_the_log_says_what_was_generated_although_nothing_follows(server, caplog, monkeypatch):
    monkeypatch.setattr(server.worker.metrics, "line_seconds", 0.3)
    monkeypatch.setattr(logging.getLogger("dsv3_jax.serving"), "propagate", True)
    with caplog.at_level(logging.INFO, "dsv3_jax.serving"):
        time.sleep(0.4)
        server.client.completions.create(model="tiny", prompt="x", max_tokens=3, extra_body={"ignore_eos": True})
        wait_until(lambda: "Avg generation throughput" in caplog.text and "Running: 0 reqs" in caplog.text, 30)


def test_64_streams_at_once(server):
    async def one(client, number):
        ask = dict(model="tiny", prompt=f"number {number}", max_tokens=12, seed=number, stream=True, extra_body={"ignore_eos": True})
        pieces = [chunk.choices[0].text async for chunk in await client.completions.create(**ask)]
        return "".join(pieces), len(pieces)

    async def together():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*[one(client, i) for i in range(64)])

    answers = asyncio.run(together())
    assert all(chunks > 3 for _, chunks in answers)
    alone = server.client.completions.create(model="tiny", prompt="number 5", max_tokens=12, seed=5, extra_body={"ignore_eos": True})
    assert answers[5][0] == alone.choices[0].text
    wait_until(lambda: idle(server.engine), 30)


def test_an_engine_that_fails_says_so_and_nobody_waits(chatty, monkeypatch):
    with running(chatty) as server:

        def fail():
            raise RuntimeError("out of luck")

        monkeypatch.setattr(server.engine, "step", fail)
        for body in ({"prompt": "x"}, {"prompt": "x"}):
            is_error(httpx.post(server.url + "/v1/completions", json=body, timeout=30), 503)
        is_error(httpx.get(server.url + "/health"), 503)


def _nonsense(rng, depth=0):
    """A random JSON value, with a taste for what programs trip over."""
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 6:
        return [_nonsense(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {rng.choice(["role", "content", "type", "schema", "text", "", "\ud800"]): _nonsense(rng, depth + 1) for _ in range(3)}
    return rng.choice(
        [
            None,
            True,
            0,
            -1,
            1e308,
            10**30,
            0.5,
            float("nan"),
            float("inf"),
            "",
            "x",
            "\0",
            "\ud800",
            "ü" * 50,
            "/etc/passwd",
            "{{ 7*7 }}",
            "-1",
        ]
    )


_GOOD = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string"}}},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "logprobs": True,
        "top_logprobs": 1,
        "chat_template_kwargs": {"start": "x"},
    },
    "/v1/completions": {"prompt": "x", "max_tokens": 1, "temperature": 0.5, "stop": ["a"], "logit_bias": {"5": 1}, "n": 1, "seed": 3},
}


def _fuzz(server, count, seed):
    """Requests with something wrong: damaged fields, damaged bytes, strange methods and headers. Returns the statuses seen."""
    rng, seen = random.Random(seed), {}
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for _ in range(count):
            url = rng.choice(list(_GOOD))
            body = json.loads(json.dumps(_GOOD[url]))
            for _ in range(rng.randint(1, 2)):
                body[rng.choice([*body, "temperature", "top_k", "min_p", "stop", "n", "stream", "bogus", ""])] = _nonsense(rng)
            content = json.dumps(body).encode()
            if rng.random() < 0.3:
                content = bytearray(content)
                for _ in range(rng.randint(1, 3)):
                    content[rng.randrange(len(content))] = rng.randrange(256)
                content = bytes(content)[: rng.randrange(len(content)) if rng.random() < 0.3 else None]
            method = rng.choice(["POST"] * 9 + ["PUT"])
            response = client.request(method, url, content=content, headers={"content-type": rng.choice(["application/json", "x", ""])})
            assert response.status_code == 200 or 400 <= response.status_code < 500, (response.status_code, content)
            if response.status_code != 200:
                is_error(response, response.status_code)
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
    return seen


def _fuzz_beside_a_stream(server, count, seed):
    text = lambda chunks: "".join(chunk.choices[0].text for chunk in chunks)  # noqa: E731
    ask = lambda: server.client.completions.create(  # noqa: E731
        model="tiny", prompt="beside", max_tokens=200, seed=3, stream=True, extra_body={"ignore_eos": True}
    )
    expected, disturbed = text(ask()), []
    listener = threading.Thread(target=lambda: disturbed.append(text(ask())))
    listener.start()
    seen = _fuzz(server, count, seed)
    listener.join()
    assert disturbed == [expected]
    assert seen[400] > count / 2
    wait_until(lambda: idle(server.engine), 30)
    assert httpx.get(server.url + "/health").status_code == 200


def test_malformed_requests_are_refused_and_disturb_nobody(server):
    _fuzz_beside_a_stream(server, 300, seed=0)


@pytest.mark.slow
def test_ten_thousand_malformed_requests(server):
    _fuzz_beside_a_stream(server, 10_000, seed=1)


@pytest.mark.timeout(180)
def test_sigterm_lets_answers_finish(plain):
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "serve.py",
        plain.path,
        "--http",
        "--port",
        port,
        "--max-batch",
        8,
        "--max-length",
        256,
        "--prefill-tokens",
        64,
        "--cache-tokens",
        1024,  # the shapes of the other tests, whose programs it finds
        "--model-name",
        "tiny",
    ]
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert any("serving tiny" in line for line in process.stderr), "it ended before it served"
        url = f"http://127.0.0.1:{port}/v1/completions"
        body = {"prompt": [5], "max_tokens": 60, "ignore_eos": True, "n": 12, "stream": True}  # four wait for others to end
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and sum('"finish_reason": "length"' in line for line in rest) == 12
        assert process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.post(url, json=body)
        assert not re.search("Traceback|WARNING", process.stderr.read())
    finally:
        process.kill()
        process.wait()
