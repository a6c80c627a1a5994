"""Load test and throughput of the server: python benchmarks/serving.py load | throughput [options] [--save]

load        64 clients for three minutes against a small model. Most stream; some disconnect early, some read slowly,
            some send oversized bodies. Each answer is compared with that of a separate engine for the same seed. At
            the end no cache blocks may be in use, and the server's memory must have been constant (±5% after the first
            quarter of the time). Otherwise the exit code is 1.
throughput  16 streaming clients with SmolLM2-135M in 4 bits: tokens per second and time to the first token of this
            server, of the engine without a server, and of llama_cpp.server with the same file. The figures are medians
            over rounds in which each runs once. llama_cpp.server is skipped if it is not installed
            (pip install "llama-cpp-python[server]").

Clients use plain sockets, so that most of the CPU time is the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import machine

SENTENCES = (
    "The capital of Italy is Rome, and the capital of France is",
    "Once upon a time there was a small bird who could not",
    "To make bread you need flour, water, salt and",
    "The three laws of motion were written by",
    "In the morning she opened the window and saw that",
    "A list of fruits: apples, pears, oranges,",
    "The best way to learn a language is to",
    "When the train arrived at the station, everybody",
)


# HTTP over a socket ---------------------------------------------------------------------------------------------------


class Answer:
    """A response whose body is read in chunks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: int, headers: bytes) -> None:
        self.reader, self.writer, self.status, self.headers = reader, writer, status, headers.lower()

    async def chunks(self) -> AsyncIterator[bytes]:
        if b"transfer-encoding: chunked" not in self.headers:
            length = re.search(rb"content-length: (\d+)", self.headers)
            yield await self.reader.readexactly(int(length[1]) if length else 0)
            return
        while size := int(await self.reader.readline(), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readline()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the JSON data of server-sent events, without the final [DONE]."""
        held = b""
        async for chunk in self.chunks():
            *events, held = (held + chunk.replace(b"\r\n", b"\n")).split(b"\n\n")
            for each in events:
                if each.startswith(b"data: {"):
                    yield json.loads(each[6:])

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    def close(self) -> None:
        self.writer.close()


async def post(port: int, path: str, body: bytes) -> Answer:
    """POST a body on a new connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
    status, _, headers = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
    return Answer(reader, writer, int(status.split()[1]), headers)


async def get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    return text.partition("\r\n\r\n")[2]


@contextlib.contextmanager
def server(command: list[str], ready: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a server; yield its process and port when a line of its output matches `ready`, whose group is the port."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port, said = 0, ""
    for line in process.stderr:
        said += line
        if found := re.search(ready, line):
            port = int(found[1])
            break
    if not port:
        raise SystemExit(f"the server did not start:\n{said}")
    reading = threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True)
    reading.start()
    try:
        yield process, port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reading.join()
        process.stderr.close()


def gptsmith_command(model: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "gptsmith", "serve", str(model), "--port", "0", "--log-level", "error", *options]


# load -----------------------------------------------------------------------------------------------------------------


def small_model(directory: Path) -> None:
    """Write a small model with random weights, and a tokenizer."""
    import torch

    from gptsmith.checkpoint import save_checkpoint
    from gptsmith.model import families
    from gptsmith.model.transformer import Transformer
    from gptsmith.tokenizer import train_bpe

    tokenizer = train_bpe([" ".join(SENTENCES)] * 4, 400)
    torch.manual_seed(1)
    config = families.llama(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    save_checkpoint(directory, Transformer(config), tokenizer)


class Reference:
    """The texts of an engine without a server. Requests repeat and texts are cached, so that it has little to do."""

    def __init__(self, directory: Path) -> None:
        import gptsmith
        from gptsmith.engine.engine import Engine

        model, self.tokenizer = gptsmith.load(str(directory))
        self.engine = Engine(model, vocab_size=self.tokenizer.vocab_size)
        self._cache: dict[tuple[str, int, int, int], list[str]] = {}

    def texts(self, prompt: str, seed: int, count: int, n: int) -> list[str]:
        from gptsmith.engine.sampling import SamplingParams
        from gptsmith.engine.text import generate_texts

        key = (prompt, seed, count, n)
        if key not in self._cache:
            params = SamplingParams(max_tokens=count, temperature=1.0, seed=seed, n=n)
            self._cache[key] = generate_texts(self.engine, self.tokenizer, [prompt], params)[0]
        return self._cache[key]


class Load:
    """Clients of several kinds. errors: descriptions of what went wrong."""

    def __init__(self, port: int, reference: Reference, until: float) -> None:
        self.port, self.reference, self.until = port, reference, until
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []

    async def client(self, number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < self.until:
            kind = rng.choices(("stream", "disconnect", "slow", "whole", "oversize"), (60, 15, 10, 10, 5))[0]
            prompt, seed = rng.choice(SENTENCES), rng.randrange(12)
            n, count = rng.choice((1, 1, 1, 2)), rng.choice((8, 40, 120))
            self.counts[kind] += 1
            try:
                await getattr(self, kind)(rng, prompt, seed, count, n)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                self.errors.append(f"{kind}: {type(error).__name__}: {error}")

    async def _complete(self, prompt: str, seed: int, count: int, n: int, stream: bool) -> Answer | None:
        body = {"model": "model", "prompt": prompt, "seed": seed, "max_tokens": count, "n": n, "stream": stream}
        answer = await post(self.port, "/v1/completions", json.dumps(body).encode())
        if answer.status == 200:
            return answer
        self.errors.append(f"status {answer.status}: {(await answer.body())[:200]!r}")
        answer.close()
        return None

    async def _read(self, answer: Answer, n: int, *, pause: float = 0.0, stop_after: int | None = None) -> list[str]:
        texts, events = [""] * n, 0
        async for event in answer.events():
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
            events += 1
            if events == stop_after:
                break
            if pause:
                await asyncio.sleep(pause)
        answer.close()
        return texts

    async def stream(self, rng: random.Random, prompt: str, seed: int, count: int, n: int, pause: float = 0.0) -> None:
        answer = await self._complete(prompt, seed, count, n, True)
        if answer is not None:
            texts = await self._read(answer, n, pause=pause)
            if texts != self.reference.texts(prompt, seed, count, n):
                self.errors.append(f"wrong answer to {prompt!r}, seed {seed}, {count} tokens: {texts!r}")

    async def slow(self, rng: random.Random, prompt: str, seed: int, count: int, n: int) -> None:
        await self.stream(rng, prompt, seed, count, n, pause=0.05)

    async def disconnect(self, rng: random.Random, prompt: str, seed: int, count: int, n: int) -> None:
        answer = await self._complete(prompt, seed, count, n, True)
        if answer is not None:
            texts = await self._read(answer, n, stop_after=rng.randrange(1, 10))
            expected = self.reference.texts(prompt, seed, count, n)
            if not all(whole.startswith(part) for whole, part in zip(expected, texts, strict=True)):
                self.errors.append(f"wrong beginning of the answer to {prompt!r}, seed {seed}: {texts!r}")

    async def whole(self, rng: random.Random, prompt: str, seed: int, count: int, n: int) -> None:
        answer = await self._complete(prompt, seed, count, n, False)
        if answer is not None:
            texts = [choice["text"] for choice in json.loads(await answer.body())["choices"]]
            answer.close()
            if texts != self.reference.texts(prompt, seed, count, n):
                self.errors.append(f"wrong answer to {prompt!r}, seed {seed}, {count} tokens: {texts!r}")

    async def oversize(self, rng: random.Random, prompt: str, seed: int, count: int, n: int) -> None:
        answer = await post(self.port, "/v1/completions", b" " * rng.randrange(1 << 16 | 1, 1 << 20))
        if answer.status != 413:
            self.errors.append(f"oversized body: status {answer.status}, not 413")
        answer.close()

    async def run(self, clients: int, process: int) -> list[float]:
        """Run all clients. Return the server's resident memory in MB, once per second."""
        import psutil

        server_process, memory = psutil.Process(process), []
        tasks = [asyncio.create_task(self.client(number)) for number in range(clients)]
        while time.monotonic() < self.until:
            await asyncio.sleep(1)
            memory.append(server_process.memory_info().rss / 1e6)
        await asyncio.gather(*tasks)
        return memory


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        small_model(directory)
        reference = Reference(directory)
        options = ["--max-body", str(1 << 16), "--queue-limit", "1000"]
        with server(gptsmith_command(directory, *options), r"at http://127\.0\.0\.1:(\d+)") as (process, port):
            test = Load(port, reference, time.monotonic() + arguments.seconds)
            memory = asyncio.run(test.run(arguments.clients, process.pid))
            metrics = _settled(port)
        code = process.returncode
    settled = memory[len(memory) // 4 :]
    middle = statistics.median(settled)
    spread = max(abs(value - middle) / middle for value in settled)
    result = {
        "seconds": arguments.seconds,
        "clients": arguments.clients,
        "requests": dict(test.counts),
        "generated_tokens": metrics["generated_tokens_total"],
        "wrong_answers": len(test.errors),
        "memory_mb": round(middle, 1),
        "memory_spread_percent": round(100 * spread, 2),
        "blocks_in_use_at_the_end": metrics["kv_cache_use"] * metrics["kv_cache_blocks"],
        "exit_code": code,
    }
    for each in test.errors[:10]:
        print(each, file=sys.stderr)
    result["ok"] = not test.errors and spread <= 0.05 and not metrics["kv_cache_use"] and code == 0
    return result


def _settled(port: int) -> dict[str, float]:
    """Return the server's metrics when no request is running any more."""
    values: dict[str, float] = {}
    for _ in range(200):
        lines = asyncio.run(get(port, "/metrics")).splitlines()
        values = {
            line.split("{")[0].split(" ")[0].removeprefix("gptsmith_"): float(line.split(" ")[-1])
            for line in lines
            if line.startswith("gptsmith_")
        }
        if not values["requests_running"] and not values["sequences_running"]:
            break
        time.sleep(0.05)
    return values


# throughput -----------------------------------------------------------------------------------------------------------


async def clients(process: int, port: int, model: str, count: int, rounds: int, tokens: int) -> dict[str, float]:
    """Run `count` clients, each with `rounds` requests in sequence. Count tokens as the server reports them."""
    first: list[float] = []

    async def client(number: int) -> int:
        generated = 0
        for i in range(rounds):
            body = {"model": model, "prompt": _prompt(number, i), "max_tokens": tokens, "seed": number * 100 + i}
            body |= {"temperature": 0.8, "stream": True}
            if model == "gptsmith":
                body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
            began = time.perf_counter()
            answer = await post(port, "/v1/completions", json.dumps(body).encode())
            if answer.status != 200:
                raise SystemExit(f"status {answer.status}: {(await answer.body())[:300]!r}")
            reported, chunks, started = 0, 0, False
            async for event in answer.events():
                if event.get("usage"):
                    reported = event["usage"]["completion_tokens"]
                if event["choices"]:
                    chunks += 1
                    if not started:
                        started = True
                        first.append(time.perf_counter() - began)
            answer.close()
            generated += reported or chunks  # llama_cpp.server sends one chunk per token
        return generated

    began, before = time.perf_counter(), _cpu_seconds(process)
    generated = sum(await asyncio.gather(*(client(number) for number in range(count))))
    return _figures(generated, time.perf_counter() - began, first, _cpu_seconds(process) - before)


def _cpu_seconds(process: int) -> float:
    import psutil

    times = psutil.Process(process).cpu_times()
    return float(times.user + times.system)


def _prompt(number: int, i: int) -> str:
    return f"{number}, {i}. {SENTENCES[number % len(SENTENCES)]}"


def _figures(generated: int, seconds: float, first: list[float], cpu_seconds: float) -> dict[str, float]:
    """cpu_seconds: of the program on all cores, which other programs on the machine affect less than the wall time."""
    cuts = statistics.quantiles(first, n=100, method="inclusive")
    return {
        "tokens": generated,
        "tokens_a_second": round(generated / seconds, 2),
        "first_token_p50": round(cuts[49], 4),
        "first_token_p99": round(cuts[98], 4),
        "processor_ms_a_token": round(1000 * cpu_seconds / generated, 3),
    }


def engine_alone(arguments: argparse.Namespace) -> dict[str, float]:
    """Submit the same requests directly to an engine, in the order in which the clients would."""
    from gptsmith.engine.sampling import SamplingParams
    from gptsmith.engine.text import encode_prompt
    from gptsmith.server.models import load as load_model

    loaded = load_model(arguments.model)
    loaded.engine.close()
    engine, tokenizer = loaded.engine.engine, loaded.tokenizer
    results = {}
    for measured in (False, True):
        rounds = arguments.rounds if measured else 1
        engine.on_weights_updated()
        first: list[float] = []
        running: dict[int, tuple[int, int, float]] = {}

        def submit(number: int, i: int, running: dict[int, tuple[int, int, float]] = running) -> None:
            params = SamplingParams(max_tokens=arguments.tokens, temperature=0.8, seed=number * 100 + i)
            ids = encode_prompt(tokenizer, _prompt(number, i))
            running[engine.add_request(ids, params)] = (number, i, time.perf_counter())

        began, before, generated, seen = time.perf_counter(), time.process_time(), 0, set()
        for number in range(arguments.clients):
            submit(number, 0)
        while running:
            for event in engine.step():
                number, i, since = running[event.request]
                if event.ids and event.request not in seen:
                    seen.add(event.request)
                    first.append(time.perf_counter() - since)
                generated += len(event.ids)
                if event.result is not None:
                    del running[event.request]
                    if i + 1 < rounds:
                        submit(number, i + 1)
        results = _figures(generated, time.perf_counter() - began, first, time.process_time() - before)
    return results


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    from gptsmith.loading import resolve_model

    model = resolve_model(arguments.model)
    options = (arguments.clients, arguments.rounds, arguments.tokens)
    programs = ["engine", "server"]
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("starlette_context"):
        programs.append("llama_cpp.server")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(arguments.repeats):
        for name in programs:
            if name == "engine":
                own = [sys.executable, __file__, "_engine", "--model", str(model), "--clients", str(options[0])]
                own += ["--rounds", str(options[1]), "--tokens", str(options[2])]
                figures = json.loads(subprocess.run(own, check=True, capture_output=True, text=True).stdout)
            elif name == "server":
                command = gptsmith_command(model, "--alias", f"gptsmith={model}")
                with server(command, r"at http://127\.0\.0\.1:(\d+)") as (process, port):
                    asyncio.run(clients(process.pid, port, "gptsmith", options[0], 1, options[2]))
                    figures = asyncio.run(clients(process.pid, port, "gptsmith", *options))
            else:
                command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", "8917"]
                command += ["--n_ctx", "2048", "--n_threads", str(os.cpu_count()), "--interrupt_requests", "false"]
                with server(command, r"running on http://\S+:(\d+)") as (process, port):
                    asyncio.run(clients(process.pid, port, "llama", options[0], 1, 4))
                    figures = asyncio.run(clients(process.pid, port, "llama", *options))
            results[name].append(figures)
            print(name, figures, file=sys.stderr)
    medians: dict[str, Any] = {
        name: {figure: statistics.median(each[figure] for each in runs) for figure in runs[0]}
        for name, runs in results.items()
    }
    ratios = [
        s["tokens_a_second"] / e["tokens_a_second"] for s, e in zip(results["server"], results["engine"], strict=True)
    ]
    return {
        "clients": options[0],
        "requests_a_client": options[1],
        "tokens_a_request": options[2],
        "repeats": arguments.repeats,
        **medians,
        "server_to_engine": round(statistics.median(ratios), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "throughput", "_engine"))
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3, help="requests per client")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/serving-*.json")
    arguments = parser.parse_args()
    arguments.clients = arguments.clients or (64 if arguments.what == "load" else 16)
    if arguments.what == "_engine":
        print(json.dumps(engine_alone(arguments)))
        return 0
    result = load(arguments) if arguments.what == "load" else throughput(arguments)
    print(json.dumps(result, indent=1))
    if arguments.save:
        machine.save(f"serving-{arguments.what}", result)
    return 0 if result.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
