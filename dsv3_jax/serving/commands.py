"""What `serve.py` does once its options are known: one prompt, a batch file, a chat, HTTP, a benchmark."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable

import rich.console
import rich.progress

from dsv3_jax import compilation_cache
from dsv3_jax.command_line import check_backend, check_file
from dsv3_jax.errors import UserError, full_memory_told, needs_extra
from dsv3_jax.serving.batch import REQUESTS, run_batch
from dsv3_jax.serving.engine import Engine, check_drafts
from dsv3_jax.serving.openai import CHAT, COMPLETIONS, Api, validate
from dsv3_jax.serving.request import Request
from dsv3_jax.serving.text import ReasoningSplitter

_PROMPT_TOKENS = 256  # of an answer to --prompt, if --max-tokens does not say


def run(options: argparse.Namespace, make_engine: Callable[[], Engine]) -> int:
    """The exit status. The engine is made late: wrong options are refused before a model is loaded."""
    with full_memory_told(
        "spread the experts over more devices (--mesh expert=N), take FP8 weights, or lower --cache-tokens, --prefill-tokens or --max-batch"
    ):
        return _run(options, make_engine)


def _run(options: argparse.Namespace, make_engine: Callable[[], Engine]) -> int:
    check_drafts(options.speculate)
    check_backend()
    if options.bench:
        from dsv3_jax.serving import bench

        if options.text:
            check_file(options.text, "a text file to cut prompts from")
        compilation_cache.use()
        engine = make_engine()
        requests = bench.make_requests(engine, options)  # before minutes of compilation: what is wrong with them
        compile_all(engine)
        return bench.run(engine, requests, options)
    if options.input:
        check_file(options.input, REQUESTS)
    if options.output and not options.output.absolute().parent.is_dir():
        raise UserError(f"{options.output.absolute().parent} does not exist: make it, or give another --output")
    if options.output and options.output.is_dir():
        raise UserError(f"{options.output} is a folder: give the name of a file as --output")
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop")
    defaults = {name: value for name in names if (value := getattr(options, name)) not in (None, [])}
    validate(COMPLETIONS, defaults)
    socket = None
    if options.http:
        try:
            from dsv3_jax.serving import http
        except ModuleNotFoundError as error:
            raise needs_extra("--http", "serve") from error

        socket = http.listen(options.host, options.port)
    compilation_cache.use()
    engine = make_engine()
    if options.prompt is not None:
        defaults.setdefault("max_tokens", _PROMPT_TOKENS)
    api = Api(engine, options.model_name or options.model.resolve().name, defaults)
    if options.input:
        return batch(api, options)
    if engine.tokenizer is None and not options.http:
        raise UserError(f"{options.model} has no tokenizer: only --input with prompts of token ids can be answered")
    if options.http:
        log_to_stderr()
        compile_all(engine)
        http.serve_http(api, socket, api_key=options.api_key or os.environ.get("DSV3_API_KEY"))
        return 0
    if options.prompt is not None:
        return prompt(api, options)
    return chat(api, options)


def log_to_stderr() -> None:
    """What the server logs; the root logger is other packages' affair."""
    log = logging.getLogger("dsv3_jax.serving")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def compile_all(engine: Engine) -> None:
    """Compiles every shape, with a progress bar on a terminal."""
    start = time.monotonic()
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress("compiling", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), console=console) as bar:
        bar.disable = not console.is_terminal
        task = bar.add_task("", total=None)
        for done, total in engine.compile():
            bar.update(task, completed=done, total=total)
    print(f"{total} shapes compiled in {time.monotonic() - start:.0f} s", file=sys.stderr)


def batch(api: Api, options: argparse.Namespace) -> int:
    with Progress() as progress:
        failed = run_batch(api, options.input, options.output, seed=options.seed, progress=progress)
    if (stats := api.engine.stats).drafted:
        by_place = ", ".join(f"{part:.1%}" for part in stats.acceptance)
        print(f"drafts accepted: {stats.accepted} of {stats.drafted} ({by_place})", file=sys.stderr)
    if failed:
        print(f"{failed} line{'s' * (failed > 1)} failed: see the errors in {options.output}", file=sys.stderr)
    return 1 if failed else 0


def prompt(api: Api, options: argparse.Namespace) -> int:
    (request,) = api.parse(COMPLETIONS, {"prompt": options.prompt}, id="", seed=options.seed).requests
    for text in stream(api.engine, request):
        print(text, end="", flush=True)
    print()
    return 0


def chat(api: Api, options: argparse.Namespace) -> int:
    """Lines in, answers out, until end of input. What stands between <think> and </think> is shown dim."""
    if api.engine.tokenizer.chat_template is None:
        raise UserError(f"{options.model} has no chat template: continue a text with --prompt")
    terminal = sys.stdin.isatty()
    messages: list[dict] = []
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return 0
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        try:
            job = api.parse(CHAT, {"messages": messages}, id="", seed=options.seed + len(messages))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        splitter, answer = ReasoningSplitter(job.reasoning), ""
        for text in stream(api.engine, job.requests[0]):
            reasoning, content = splitter.push(text)
            answer += content
            print(f"\x1b[2m{reasoning}\x1b[0m{content}" if reasoning and terminal else content, end="", flush=True)
        content = splitter.push("", last=True)[1]
        print(content)
        messages.append({"role": "assistant", "content": answer + content})


def stream(engine: Engine, request: Request):
    """The answer's text, piece by piece. Left early (Ctrl-C), the request is aborted."""
    engine.add(request)
    try:
        while request.finish_reason is None or engine.has_work:
            for output in engine.step():
                yield output.text
    finally:
        engine.abort(request)


class Progress:
    """Lines done and tokens a second: a bar on a terminal, a line every ten seconds elsewhere."""

    def __enter__(self):
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(), "{task.completed}/{task.total} lines", "{task.fields[rate]}", rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task("", total=None, rate="")
        self._start = self._last = time.monotonic()
        return self

    def __call__(self, done: int, total: int, api: Api) -> None:
        now = time.monotonic()
        rate = f"{api.engine.stats.generated_tokens / (now - self._start):.1f} tokens/s"
        self._bar.update(self._task, completed=done, total=total, rate=rate)
        if self._bar.disable and (now - self._last > 10 or done == total):
            print(f"{done}/{total} lines, {rate}", file=sys.stderr, flush=True)
            self._last = now

    def __exit__(self, *_):
        self._bar.stop()
