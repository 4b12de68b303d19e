"""How long OpenAI's client waits for `mezzotint serve`: p50 and p95, alone, twenty at once, and beside a long request.

    python benchmarks/serving.py [--model NAME|FILE] [--requests 20] [--clients 20] [--json FILE]

The real server on loopback, asked by the `openai` package. Rows:

middle           a word between prompt and suffix, the likeliest (the search of `infill`)
middle, drawn    the same at temperature 0.7
16 tokens        behind a prompt; with `first` the time to the first piece of a stream
N at once        as many clients as --clients, each asking for 16 tokens behind a prompt
beside a long    16 tokens, while another client's 250 masks are being filled; `long` is that client's own time

Times are of the client's clock, seconds. What else the machine does shows.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import torch

import mezzotint
from mezzotint.apps.serve import running
from mezzotint.network.model import Model

PROMPTS = (
    "The old house stood at the end of the",
    "She opened the letter and read it",
    "It was a dark night, and",
    "He had not seen his brother since",
    "The captain of the ship said that",
)
SUFFIX = ", and nobody said a word about it."


def summary(seconds: list[float]) -> dict[str, float]:
    """p50 and p95 of times, and how many."""
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"p50": statistics.median(ordered), "p95": last, "requests": len(ordered)}


def timed(ask: Callable[[int], Any], numbers: range) -> list[float]:
    """Seconds of each request, one after another."""
    found = []
    for number in numbers:
        started = time.perf_counter()
        ask(number)
        found.append(time.perf_counter() - started)
    return found


class Client:
    """The requests of the rows, by number: another prompt and seed each."""

    def __init__(self, port: int, tokens: int) -> None:
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
        self.port, self.tokens = port, tokens

    def middle(self, number: int, **options: Any) -> None:
        """A word between two texts."""
        self.client.completions.create(
            model="model", prompt=PROMPTS[number % len(PROMPTS)], suffix=SUFFIX, max_tokens=4, seed=number, **options
        )

    def continuation(self, number: int) -> None:
        """Tokens behind a prompt."""
        self.client.completions.create(
            model="model", prompt=PROMPTS[number % len(PROMPTS)], max_tokens=self.tokens, seed=number
        )

    def first_piece(self, number: int) -> None:
        """The same as a stream, until its first piece has come."""
        stream = self.client.completions.create(
            model="model", prompt=PROMPTS[number % len(PROMPTS)], max_tokens=self.tokens, seed=number, stream=True
        )
        next(iter(stream))
        stream.close()

    def long(self, masks: int) -> float:
        """Seconds of the page's request for a gap of so many masks, each by a pass."""
        body = {"text": f"It was a dark night. [MASK*{masks}] Nobody slept.", "temperature": 0.7}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        started = time.perf_counter()
        connection.request("POST", "/api/fill", json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().read()
        connection.close()
        return time.perf_counter() - started


def measure(model: Model, requests: int, clients: int, masks: int, tokens: int) -> dict[str, dict[str, float]]:
    """Rows of figures, by name."""
    rows: dict[str, dict[str, float]] = {}
    with running(model) as port:
        client = Client(port, tokens)
        client.continuation(0)  # what is done once only
        client.middle(0)
        numbers = range(requests)
        rows["middle"] = summary(timed(client.middle, numbers))
        rows["middle, drawn"] = summary(timed(lambda k: client.middle(k, temperature=0.7), numbers))
        rows[f"{tokens} tokens"] = summary(timed(client.continuation, numbers))
        rows[f"{tokens} tokens, first"] = summary(timed(client.first_piece, numbers))
        with ThreadPoolExecutor(clients) as pool:
            started = time.perf_counter()
            each = list(pool.map(lambda k: timed(client.continuation, range(k, k + 1))[0], range(clients)))
            rows[f"{clients} at once"] = {**summary(each), "all": time.perf_counter() - started}
        with ThreadPoolExecutor(1) as pool:
            alone = client.long(masks)
            long = pool.submit(client.long, masks)
            each = []
            while not long.done():
                each += timed(client.continuation, range(len(each), len(each) + 1))
            rows[f"beside {masks} masks"] = {**summary(each), "long": long.result(), "long alone": alone}
    return rows


def main(words: list[str] | None = None) -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a .mzt artifact, a run folder or a shipped model's name")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--masks", type=int, default=250, help="of the long request")
    parser.add_argument("--tokens", type=int, default=16, help="of a continuation")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    model = mezzotint.load(args.model) if args.model else mezzotint.load()
    rows = measure(model, args.requests, args.clients, args.masks, args.tokens)
    print(f"{torch.get_num_threads()} threads\n")
    print("| requests | p50, s | p95, s | of | |\n|---|---:|---:|---:|---|")
    for name, row in rows.items():
        more = ", ".join(f"{k} {v:.2f} s" for k, v in row.items() if k not in ("p50", "p95", "requests"))
        print(f"| {name} | {row['p50']:.3f} | {row['p95']:.3f} | {row['requests']} | {more} |")
    if args.json:
        args.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
