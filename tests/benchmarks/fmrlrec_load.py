"""How many requests a second the service answers, how fast, and whether every answer is right.

    python -m tests.benchmarks.fmrlrec_load --seconds 20
    python -m tests.benchmarks.fmrlrec_load --sizes 64 --seconds 600 --restarts 5

An untrained model over a catalogue of the size of Amazon Beauty is served by a process of its own,
and this process asks: half of the requests are events, half recommendations. Afterwards, and after
each restart (SIGKILL), recommendations of some users are compared with those of the model over the
whole history at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from examples.fmrlrec.data import left_pad
from examples.fmrlrec.model import Recommender, Shape

CHECKED, COUNT = 100, 10


@dataclass
class Seen:
    """What the asking side knows: histories by user, and seconds of answers by kind."""

    histories: dict[str, list[int]]
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failed: int = 0


def model_of(items: int, size: int) -> Recommender:
    """An untrained model, the same in both processes."""
    torch.manual_seed(size)
    model = Recommender(Shape(items, size, r_min=0.8)).eval()
    with torch.no_grad():
        model.items.weight.normal_()
    return model


def histories_of(users: int, items: int) -> dict[str, np.ndarray]:
    """Random histories of the lengths of Amazon Beauty, the same in both processes."""
    draws = np.random.default_rng(0)
    lengths = np.minimum(3 + draws.geometric(1 / 6, users), 50)
    return {f"u{n}": draws.integers(1, items + 1, length) for n, length in enumerate(lengths)}


def serve_child(given: argparse.Namespace) -> None:
    """The served process."""
    import uvicorn

    from examples.fmrlrec.serving.live import Live
    from examples.fmrlrec.serving.service import Shop, application

    torch.set_num_threads(1)
    models = {size: model_of(given.items, size) for size in given.sizes}
    ids = [str(number) for number in range(1, given.items + 1)]
    live = Live(models, ids, histories_of(given.users, given.items), index=given.index)
    live.replay(given.log)
    app = application(Shop(live, {name: f"Item {name}" for name in ids}, {}))
    uvicorn.run(app, port=given.port, log_level="warning", access_log=False)


def start(given: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Starts the served process and waits until it is healthy."""
    words = [f"--{n}={v}" for n, v in vars(given).items() if n in ("items", "users", "port", "log")]
    sizes = ",".join(map(str, given.sizes))
    words += [f"--sizes={sizes}", f"--index={given.index}", "--child"]
    child = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.fmrlrec_load", *words])
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{given.port}/health", timeout=1).close()
            return child
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the service did not answer within two minutes")


async def client(given: argparse.Namespace, seen: Seen, number: int, until: float) -> None:
    """One connection that is kept: events and recommendations of users of its own."""
    draws = random.Random(number + given.round * 1000)
    users = [user for user in seen.histories if int(user[1:]) % given.clients == number]
    reader, writer = await asyncio.open_connection("127.0.0.1", given.port)
    while time.perf_counter() < until:
        user, kind = draws.choice(users), draws.choice(("event", "recommend"))
        item = draws.randint(1, given.items)
        size = draws.choice(given.sizes)
        started = time.perf_counter()
        try:
            status, _ = await ask(reader, writer, request(kind, user, item, size))
        except (OSError, asyncio.IncompleteReadError, IndexError):
            return
        seen.seconds[kind if kind == "event" else f"size {size}"].append(
            time.perf_counter() - started
        )
        seen.failed += status != 200
        if kind == "event" and status == 200:
            seen.histories[user].append(item)
    writer.close()


def request(kind: str, user: str, item: int, size: int) -> bytes:
    """A request as its bytes."""
    if kind == "recommend":
        line = f"GET /recommend?user={user}&size={size}&k={COUNT} HTTP/1.1\r\nhost: x\r\n\r\n"
        return line.encode()
    body = json.dumps({"user": user, "item": str(item)})
    head = "POST /events HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: bytes
) -> tuple[int, bytes]:
    """Sends a request and reads its answer: status and body."""
    writer.write(asked)
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    length = int(lengths[0].split(b":")[1])
    return int(head.split(b" ", 2)[1]), await reader.readexactly(length)


async def burst(given: argparse.Namespace, seen: Seen, seconds: float) -> None:
    """All clients at once for a while."""
    until = time.perf_counter() + seconds
    await asyncio.gather(*(client(given, seen, n, until) for n in range(given.clients)))


@torch.no_grad()
def wrong_answers(given: argparse.Namespace, seen: Seen) -> int:
    """Answers of some users that are not the model's over their whole history."""
    wrong = 0
    users = random.Random(given.round).sample(list(seen.histories), min(CHECKED, given.users))
    for size in given.sizes:
        model = model_of(given.items, size)
        for user in users:
            history = seen.histories[user]
            scores = model(torch.from_numpy(left_pad([np.array(history)], len(history))))[0, -1]
            scores[[0, *history]] = -torch.inf
            address = f"http://127.0.0.1:{given.port}/recommend?user={user}&size={size}&k={COUNT}"
            with urllib.request.urlopen(address) as answer:
                found = json.load(answer)["sizes"][str(size)]
            theirs = scores[[int(item["id"]) for item in found]]
            # Items whose scores differ by rounding alone may stand in either order.
            wrong += not torch.allclose(theirs, scores.topk(COUNT).values, rtol=1e-4, atol=1e-4)
    return wrong


def report(given: argparse.Namespace, seen: Seen, wrong: int, elapsed: float) -> None:
    """Prints requests a second, latencies, memory and errors."""
    everything = [s for part in seen.seconds.values() for s in part]
    print(f"{len(everything) / elapsed:.0f} requests a second by {given.clients} clients, "
          f"{given.items:,} items, {given.users:,} users, index {given.index}, sizes "
          f"{given.sizes}; {seen.failed} failed, {wrong} wrong")  # fmt: skip
    for kind, seconds in sorted(seen.seconds.items()):
        p50, p99 = 1000 * np.percentile(seconds, [50, 99])
        print(f"  {kind:10} {len(seconds):8,} answers  median {p50:6.2f} ms  p99 {p99:6.2f} ms")
    metrics = urllib.request.urlopen(f"http://127.0.0.1:{given.port}/metrics").read().decode()
    for line in metrics.splitlines():
        if line.startswith(("fmrlrec_size_bytes{", "process_resident")):
            name, value = line.rsplit(" ", 1)
            print(f"  {name}  {float(value) / 2**20:.1f} MiB")


def load(given: argparse.Namespace) -> None:
    """Asks, kills and asks again, and reports."""
    users = histories_of(given.users, given.items)
    seen = Seen({user: history.tolist() for user, history in users.items()})
    wrong, elapsed = 0, 0.0
    for number in range(given.restarts + 1):
        given.round = number
        child = start(given)
        started = time.perf_counter()
        asyncio.run(burst(given, seen, given.seconds / (given.restarts + 1)))
        elapsed += time.perf_counter() - started
        wrong += wrong_answers(given, seen)
        if number == given.restarts:
            report(given, seen, wrong, elapsed)
        child.send_signal(signal.SIGKILL)
        child.wait()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Reads the options; with --child, serves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=12_101)
    parser.add_argument("--users", type=int, default=22_363)
    sizes = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument("--sizes", type=sizes, default=[64])
    parser.add_argument("--index", default="exact")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        serve_child(given)
        return
    given.port = given.port or free_port()
    with tempfile.TemporaryDirectory() as folder:
        given.log = Path(folder) / "events.jsonl"
        load(given)


if __name__ == "__main__":
    main()
