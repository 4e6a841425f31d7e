"""The scenarios of the staging benchmark. Each measures in interleaved rounds and says which targets were reached."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.benchmarks.staging_data import DataSet, build, change, drop_cache, touch_memory
from tests.benchmarks.staging_peers import (
    BUCKET,
    BenchmarkError,
    Measured,
    Sink,
    client_environment,
    measure,
    per_file_command,
    running_sink,
    upload_commands,
)

OURS = "trainyard"
OVER_HTTPS = "trainyard, unsigned"
TINY = DataSet("8KB", 20_000, 8_192)
SMALL = DataSet("200KB", 2_000, 200_000)
MEDIUM = DataSet("5MB", 160, 5_000_000)
LINKED = DataSet("5MB-link", 500, 5_000_000)
HUGE = DataSet("250MB", 4, 250_000_000)
LINE_MBIT = 500
LATENCY_MS = 30
MAX_RSS_MB = 350
SLOW_CLIENTS = frozenset({"aws s3 sync", "rclone"})


@dataclass(frozen=True)
class Target:
    text: str
    value: float
    limit: float
    at_least: bool = True
    unit: str = "x"

    @property
    def reached(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass
class Outcome:
    title: str
    rows: dict[str, list[Measured]] = field(default_factory=dict[str, list[Measured]])
    targets: list[Target] = field(default_factory=list[Target])
    notes: list[str] = field(default_factory=list[str])

    def wall(self, name: str) -> float:
        return statistics.median(measured.wall for measured in self.rows[name])

    def expect_faster(self, than: str, limit: float) -> None:
        """Without effect where one of them was not measured."""
        if than in self.rows and OURS in self.rows:
            self.targets.append(Target(f"{OURS} against {than}", self.wall(than) / self.wall(OURS), limit))

    def expect_memory(self) -> None:
        most = max(measured.rss_mb for name in self.rows if name.startswith((OURS, "library")) for measured in self.rows[name])
        self.targets.append(Target("peak memory of ours", most, MAX_RSS_MB, at_least=False, unit=" MB"))


@dataclass
class Bench:
    """What the scenarios share: tools, a folder for data, and how often each client is measured."""

    tools: dict[str, Path]
    root: Path
    rounds: int
    slow_rounds: int
    only: frozenset[str] = frozenset()  # clients; empty: all

    @contextmanager
    def data(self, wanted: DataSet) -> Iterator[Path]:
        folder = build(wanted, self.root)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def times(self, client: str) -> int:
        if self.only and client not in self.only:
            return 0
        return self.slow_rounds if client in SLOW_CLIENTS else self.rounds

    def rate(self, sink: Sink, commands: dict[str, list[str]], before: Callable[[int], None] = lambda _: None) -> dict[str, list[Measured]]:
        """Every client in turn, round by round, each with the folder of its state as `before` leaves it."""
        wanted = {name: command for name, command in commands.items() if self.times(name)}
        rows: dict[str, list[Measured]] = {name: [] for name in wanted}
        for number in range(max(map(self.times, wanted), default=0)):
            for name in in_turn(wanted, number):
                if number < self.times(name):
                    before(number)
                    rows[name].append(self.run(name, wanted[name], sink))
        return rows

    def run(self, name: str, command: list[str], sink: Sink) -> Measured:
        if sys.stderr.isatty():
            print(f"\r\x1b[K  {name} ...", end="", file=sys.stderr, flush=True)
        touch_memory()
        return measure(command, sink, client_environment(sink, self.home, unsigned="unsigned" in name))

    @property
    def home(self) -> Path:
        return self.root / "home"

    def forget(self, sink: Sink) -> None:
        """An empty store and no cache of what was staged."""
        sink.clear()
        shutil.rmtree(self.home, ignore_errors=True)


def in_turn(clients: Iterable[str], round_number: int) -> list[str]:
    """Every other round backwards, as what ran before has an effect on what comes next."""
    return list(clients)[:: -1 if round_number % 2 else 1]


def chosen(commands: dict[str, list[str]], *names: str) -> dict[str, list[str]]:
    return {name: commands[name] for name in names}


def _first_upload(bench: Bench, wanted: DataSet, *clients: str, cold: bool = False) -> Outcome:
    outcome = Outcome(f"first upload, {wanted}{', cold page cache' if cold else ''}")
    with bench.data(wanted) as folder, running_sink(bench.tools["sink"]) as sink:

        def prepare(_: int) -> None:
            bench.forget(sink)
            if cold:
                drop_cache(folder)

        commands = upload_commands(bench.tools, folder, sink)
        commands["per file, 32, unsigned"] = per_file_command(folder, 32)
        commands[OVER_HTTPS] = commands[OURS]
        commands["per file, 8"] = per_file_command(folder, 8)
        outcome.rows = bench.rate(sink, chosen(commands, *clients), prepare)
    return outcome


def _expect_per_file(outcome: Outcome) -> None:
    """Against the best number of threads, with the library's own settings, which are also ours."""
    peers = [name for name in outcome.rows if name.startswith("per file") and "unsigned" not in name]
    if peers and OURS in outcome.rows:
        outcome.expect_faster(min(peers, key=outcome.wall), 0.95)


def _note_https(outcome: Outcome) -> None:
    if outcome.rows.keys() >= {"s5cmd", OVER_HTTPS}:
        share = outcome.wall("s5cmd") / outcome.wall(OVER_HTTPS)
        outcome.notes.append(f"{OVER_HTTPS}, as over https, against s5cmd: {share:.2f}x")


def upload_8kb(bench: Bench) -> list[Outcome]:
    outcome = _first_upload(bench, TINY, OURS, OVER_HTTPS, "library", "per file, 32", "per file, 128", "s5cmd", "rclone", "aws s3 sync")
    outcome.expect_faster("s5cmd", 5)
    _note_https(outcome)
    outcome.expect_faster("aws s3 sync", 40)
    _expect_per_file(outcome)
    outcome.expect_memory()
    outcome.notes.append(f"aws s3 sync and rclone: {bench.slow_rounds} round(s), as they take long")
    return [outcome]


def upload_200kb(bench: Bench) -> list[Outcome]:
    outcome = _first_upload(bench, SMALL, OURS, OVER_HTTPS, "library", "per file, 32", "per file, 128", "s5cmd", "rclone", "aws s3 sync")
    outcome.expect_faster("s5cmd", 2)
    _note_https(outcome)
    _expect_per_file(outcome)
    outcome.expect_memory()
    return [outcome]


def per_file(bench: Bench) -> list[Outcome]:
    """Never worse than objects of their own, whatever the size of the files and wherever they are read from."""
    bench = replace(bench, rounds=min(3, bench.rounds))
    outcomes: list[Outcome] = []
    for wanted in (TINY, SMALL, MEDIUM, HUGE):
        for cold in (False, True):
            if wanted is TINY and not cold:
                continue  # is measured with the others
            threads = ("per file, 8", "per file, 32") if wanted in (MEDIUM, HUGE) else ("per file, 32", "per file, 128")
            clients = (OURS, *threads, OVER_HTTPS, "per file, 32, unsigned")
            outcome = _first_upload(bench, wanted, *clients, cold=cold)
            _expect_per_file(outcome)
            if outcome.rows.keys() >= {OVER_HTTPS, "per file, 32, unsigned"}:
                share = outcome.wall("per file, 32, unsigned") / outcome.wall(OVER_HTTPS)
                outcome.notes.append(f"without a payload hash in the signature, both sides: {share:.2f}x")
            outcome.expect_memory()
            outcomes.append(outcome)
    return outcomes


def link(bench: Bench) -> list[Outcome]:
    """A link of limited bandwidth: what counts is how full it is kept."""
    outcome = Outcome(f"first upload, {LINKED}, over {LINE_MBIT} Mbit/s + {LATENCY_MS} ms")
    few = replace(bench, rounds=min(2, bench.rounds))
    with few.data(LINKED) as folder, running_sink(few.tools["sink"], mbit=LINE_MBIT, latency_ms=LATENCY_MS) as sink:
        outcome.rows = few.rate(sink, chosen(upload_commands(few.tools, folder, sink), OURS), lambda _: few.forget(sink))
        peers = chosen(upload_commands(few.tools, folder, sink), "s5cmd", "per file, 32")
        few.rounds = 1
        outcome.rows |= few.rate(sink, peers, lambda _: few.forget(sink))
    for name in outcome.rows:
        share = 100 * LINKED.bytes * 8 / (LINE_MBIT * 1e6) / outcome.wall(name)
        if name == OURS:
            outcome.targets.append(Target("share of the line rate, ours", share, 95, unit=" %"))
        else:
            outcome.notes.append(f"share of the line rate, {name}: {share:.1f} % (one round)")
    outcome.expect_memory()
    return [outcome]


def unchanged(bench: Bench) -> list[Outcome]:
    outcome = Outcome(f"nothing changed, {TINY}")
    with bench.data(TINY) as folder, running_sink(bench.tools["sink"]) as sink:
        bench.forget(sink)
        commands = upload_commands(bench.tools, folder, sink)
        for name in (OURS, "library", "s5cmd", "rclone"):
            bench.run(name, commands[name], sink)
        names = (OURS, "library", "s5cmd sync", "rclone size-only")
        outcome.rows = bench.rate(sink, chosen(commands, *names))
    outcome.expect_faster("s5cmd sync", 10)
    most = max(measured.requests for measured in outcome.rows[OURS])
    outcome.targets.append(Target("requests of ours", most, 2, at_least=False, unit=""))
    outcome.notes.append("s5cmd and rclone compare sizes (s5cmd: and times) only")
    return [outcome]


def changed(bench: Bench) -> list[Outcome]:
    outcome = Outcome(f"1 % changed, {TINY}")
    with bench.data(TINY) as folder, running_sink(bench.tools["sink"]) as sink:
        bench.forget(sink)
        commands = upload_commands(bench.tools, folder, sink)
        names = (OURS, "s5cmd sync")
        for name in (OURS, "s5cmd"):
            bench.run(name, commands[name], sink)
        rows: dict[str, list[Measured]] = {name: [] for name in names}
        for number in range(bench.rounds):
            change(folder, 0.01, number)
            for name in in_turn(names, number):
                rows[name].append(bench.run(name, commands[name], sink))
        outcome.rows = rows
    share = 100 * max(measured.bytes_in for measured in rows[OURS]) / TINY.bytes
    outcome.targets.append(Target("bytes sent by ours, all requests included, of the set", share, 1.1, at_least=False, unit=" %"))
    outcome.notes.append(f"against s5cmd sync: {outcome.wall('s5cmd sync') / outcome.wall(OURS):.1f}x")
    return [outcome]


def fetch(bench: Bench) -> list[Outcome]:
    return [_fetch(bench, wanted, limit) for wanted, limit in ((SMALL, 1.5), (TINY, 2.0))]


def _fetch(bench: Bench, wanted: DataSet, limit: float) -> Outcome:
    outcome = Outcome(f"fetch and unpack, {wanted}")
    targets = bench.root / "fetched"
    with bench.data(wanted) as folder, running_sink(bench.tools["sink"]) as sink:
        bench.forget(sink)
        uploads = upload_commands(bench.tools, folder, sink)
        for name in (OURS, "s5cmd"):
            bench.run(name, uploads[name], sink)
        for number in range(bench.rounds):
            # Always a new folder, and all are deleted at the end: ext4 avoids for a while the inodes of what was just deleted.
            for name in in_turn(("s5cmd", OURS), number):
                target = targets / f"{number} {name}"
                command = fetch_commands(bench, sink, target)[name]
                outcome.rows.setdefault(name, []).append(bench.run(name, command, sink))
                if sum(1 for path in target.rglob("*.jpg") if path.stat().st_size == wanted.size) != wanted.count:
                    raise BenchmarkError(f"{target} is not what was staged")
    shutil.rmtree(targets)
    outcome.expect_faster("s5cmd", limit)
    outcome.expect_memory()
    return outcome


def fetch_commands(bench: Bench, sink: Sink, target: Path) -> dict[str, list[str]]:
    s5cmd = [str(bench.tools["s5cmd"]), "--endpoint-url", sink.address, "--log", "error", "cp", f"s3://{BUCKET}/s5cmd/*", f"{target}/"]
    ours = [str(bench.tools["trainyard"]), "dataset", "fetch", "set", "--store", f"s3://{BUCKET}/ours", "--to", str(target)]
    return {"s5cmd": s5cmd, OURS: ours}


def _grow(bench: Bench, counts: tuple[int, ...], size: int) -> Outcome:
    """Stage, nothing changed, and fetch, each once: cost a file and memory as the number of files grows."""
    outcome = Outcome(f"scaling, files of {size:,} bytes: {', '.join(f'{count:,}' for count in counts)}")
    target = bench.root / "fetched"
    cost: dict[int, float] = {}
    for count in counts:
        with bench.data(DataSet("scaling", count, size)) as folder, running_sink(bench.tools["sink"]) as sink:
            bench.forget(sink)
            stage = upload_commands(bench.tools, folder, sink)[OURS]
            first = bench.run(f"stage {count:,}", stage, sink)
            outcome.rows[f"{OURS} stage {count:,}"] = [first]
            outcome.rows[f"{OURS} unchanged {count:,}"] = [bench.run(f"unchanged {count:,}", stage, sink)]
            command = fetch_commands(bench, sink, target)[OURS]
            outcome.rows[f"{OURS} fetch {count:,}"] = [bench.run(f"fetch {count:,}", command, sink)]
            shutil.rmtree(target)
            cost[count] = first.wall / count
    for count, seconds in cost.items():
        outcome.notes.append(f"stage {count:,}: {seconds * 1e6:.0f} us a file")
    outcome.expect_memory()
    return outcome


def scaling(bench: Bench) -> list[Outcome]:
    return [_grow(bench, (10_000, 30_000, 100_000), TINY.size)]


def million(bench: Bench) -> list[Outcome]:
    return [_grow(bench, (1_000_000,), 1_000)]


# Fetching comes first, fewest files first: ext4 looks for other inodes than those of files deleted in the last minutes, which costs
# both clients a fifth of their work and hides what differs.
SCENARIOS: dict[str, Callable[[Bench], list[Outcome]]] = {
    "fetch": fetch,
    "upload-8kb": upload_8kb,
    "upload-200kb": upload_200kb,
    "per-file": per_file,
    "link": link,
    "unchanged": unchanged,
    "changed": changed,
    "scaling": scaling,
    "million": million,
}
ON_DEMAND = frozenset({"million"})
