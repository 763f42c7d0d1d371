"""`mptbook bench speedrun`: how well models predict held-out text after the same time of training.

mptbook's recipe for mpt-tiny beside models of transformers in its size, on the same batches in
the same order. They take turns, a slice of a few seconds each, so that what slows the machine for
a while slows all of them.
"""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from mptbook.bench.measure import Bench
from mptbook.bench.peers import OURS, PEERS
from mptbook.bench.racer import (
    SCHEDULE_STEPS,
    Entry,
    peer_optim,
    scheduled,
    start_racer,
)
from mptbook.bench.training import tiny_run
from mptbook.bench.workers import Worker
from mptbook.train.pretrain import Pretrain
from mptbook.train.run import Run

SHORT = 0.4  # of the minutes, for mptbook's second run: a schedule must fit its time


def entries(contestants: list[str], rates: list[float], minutes: float, lr: float) -> list[Entry]:
    """mptbook for the whole time and for `SHORT` of it, and each peer at each rate.

    Args:
        contestants: of `OURS` and `PEERS`.
        lr: the peak learning rate of mptbook's recipe.
    """
    seconds = 60 * minutes
    ours = [
        Entry(OURS, OURS, lr, seconds),
        Entry(f"{OURS}, {SHORT * minutes:g} minutes", OURS, lr, SHORT * seconds),
    ]
    peers = [peer for peer in contestants if peer != OURS]
    return ours + [Entry(f"{peer}, lr {r:g}", peer, r, seconds) for peer in peers for r in rates]


def race(
    entered: list[Entry],
    settings: Pretrain,
    *,
    slice_seconds: float,
    look_seconds: float,
    characters: int,
) -> list[dict]:
    """Train every entry in a process of its own, one slice after another.

    Args:
        slice_seconds: of a slice, in an entry's own training time, as the next.
        look_seconds: between looks at the front of the held-out text; looks happen between
            slices, and their time is not counted.
        characters: of each domain, for these looks.

    Returns:
        For each entry what it was, its number of parameters, what `Racer.train` said last, and
        bits per byte of held-out text: ``curve``, pairs of seconds and those of the front;
        ``front`` and ``all``, those at the end. None stands for a number that is not finite.
    """
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(e.label, start_racer, e, settings, characters))
            for e in entered
        ]
        # All are made before one trains: what loads would slow down what trains.
        results = [
            asdict(entry) | worker.ask("about") | {"seconds": 0.0, "curve": []}
            for entry, worker in zip(entered, workers, strict=True)
        ]
        turn = 0
        while not all(map(_done, results)):
            for n in order(turn, len(entered)):
                if not _done(results[n]):
                    _take_turn(workers[n], results[n], slice_seconds, look_seconds)
            turn += 1
    return results


def order(turn: int, n_entries: int) -> list[int]:
    """Who comes when in a round: each starts one place earlier than in the round before."""
    return [(turn + place) % n_entries for place in range(n_entries)]


def _done(result: dict) -> bool:
    return result["seconds"] >= result["budget"]


def _take_turn(worker: Worker, result: dict, slice_seconds: float, look_seconds: float) -> None:
    """One slice, and a look if it is time for one."""
    result |= worker.ask("train", slice_seconds)
    done, seconds = _done(result), result["seconds"]
    if not done and seconds < look_seconds * (len(result["curve"]) + 1):
        return
    bits = worker.ask("look", "front")
    result["curve"].append([seconds, bits])
    print(f"{result['label']:34} {seconds:6.0f} s  {_number(bits)} bits per byte", flush=True)
    if done:
        result |= {"front": bits, "all": worker.ask("look", "all")}


def best(results: list[dict], rates: list[float]) -> dict | None:
    """The training with the fewest bits per byte of all held-out text; None if none has any.

    ``at_edge`` says whether its rate is the first or last of `rates`: then a better one may lie
    outside.
    """
    finished = [result for result in results if None not in (result["all"], result["front"])]
    if not finished:
        return None
    found = min(finished, key=lambda result: result["all"])
    return found | {"at_edge": found["lr"] in (min(rates), max(rates))}


def seconds_to_reach(curve: list[list], level: float) -> float | None:
    """When a curve of [seconds, bits] first lies at `level` or below; None if never.

    On the line between two looks. A loss falls ever more slowly and lies below that line, so
    the time errs to the late side.
    """
    before = None
    for seconds, bits in curve:
        if bits is not None and bits <= level:
            if before is None:
                return seconds
            early, high = before
            return early + (seconds - early) * (high - level) / (high - bits)
        before = None if bits is None else (seconds, bits)
    return None


def beside_peers(results: list[dict], rates: list[float]) -> dict[str, dict | None]:
    """For each peer its best training, and how mptbook's two runs stand to it.

    Returns:
        None for a peer that diverged at every rate. Otherwise `best` without its curve, and
        ``ratio``, mptbook's bits per byte over the peer's, of front and of all;
        ``seconds_to_reach`` for mptbook to have the peer's last front; and ``short_is_below``,
        whether the shorter run ends below the peer, in front and in all.
    """
    long, short = _ours(results)
    found: dict[str, dict | None] = {}
    for peer in dict.fromkeys(result["contestant"] for result in results):
        if peer == OURS:
            continue
        rival = best([result for result in results if result["contestant"] == peer], rates)
        found[peer] = rival and {
            **{key: value for key, value in rival.items() if key != "curve"},
            "ratio": {k: long[k] and long[k] / rival[k] for k in ("front", "all")},
            "seconds_to_reach": seconds_to_reach(long["curve"], rival["front"]),
            "short_is_below": {
                k: short[k] is not None and short[k] < rival[k] for k in ("front", "all")
            },
        }
    return found


def _ours(results: list[dict]) -> list[dict]:
    """The long run of mptbook, and the short one."""
    return [result for result in results if result["contestant"] == OURS]


def _number(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.4f}"


def show(results: list[dict], peers: dict[str, dict | None]) -> None:
    """Print the table of all trainings, and a few lines on each peer."""
    print(f"\n{'':34} {'':>7} {'':>9} {'':>6}   bits per byte of held-out text")
    print(f"{'training':34} {'lr':>7} {'tokens/s':>9} {'steps':>6}   {'front':>6}  {'all':>6}")
    for r in results:
        speed = r["tokens"] / r["seconds"]
        print(
            f"{r['label']:34} {r['lr']:7g} {speed:9,.0f} {r['steps']:6,}   "
            f"{_number(r['front'])}  {_number(r['all'])}"
        )
    _, short = _ours(results)
    for peer, rival in peers.items():
        if rival is None:
            print(f"\n{peer} diverged at every rate")
            continue
        edge = ", at the edge of the grid" if rival["at_edge"] else ""
        reached = rival["seconds_to_reach"]
        when = "does not reach" if reached is None else f"after {reached:.0f} s reaches"
        below = "below" if rival["short_is_below"]["all"] else "not below"
        print(
            f"\n{peer}, best at lr {rival['lr']:g}{edge}; mptbook\n"
            f"  ends at {_number(rival['ratio']['front'])} of its bits per byte (front), "
            f"{_number(rival['ratio']['all'])} (all)\n"
            f"  {when} its front of {rival['front']:.4f}\n"
            f"  in a run of {short['budget']:.0f} s ends {below} its {rival['all']:.4f} (all)"
        )


class BenchSpeedrun(Bench):
    """Held-out loss after the same time of training: `mptbook bench speedrun`."""

    data: Path = Field(description="folder that mptbook prepare wrote, with rows of 256 tokens")
    minutes: PositiveFloat = Field(5, description="of training of each; looks come on top")
    contestants: list[str] = Field(
        [OURS, *PEERS], description="mptbook alone, or with peers, separated by commas"
    )
    rates: list[PositiveFloat] = Field(
        [1e-3, 3e-3, 6e-3], min_length=1, description="peak learning rates of each peer"
    )
    slice_seconds: PositiveFloat = Field(15, description="that one trains before the next does")
    look_seconds: PositiveFloat = Field(30, description="of training between looks")
    characters: PositiveInt = Field(
        65_536, description="of each held-out domain for these; all of it at the end"
    )

    @field_validator("contestants")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in (OURS, *PEERS):
                raise ValueError(f"{name!r} is not one of {', '.join((OURS, *PEERS))}")
        if OURS not in names:
            raise ValueError(f"{OURS} must be one of them: the others are compared with it")
        return list(dict.fromkeys(names))

    def compare(self) -> dict[str, Any]:
        """The figures, as JSON has them."""
        recipe = tiny_run().model_copy(update={"data": self.data})
        made_with = Run.make(recipe).made_with  # raises what does not fit, before any process
        trainings = race(
            entries(self.contestants, self.rates, self.minutes, recipe.optim.lr),
            recipe,
            slice_seconds=self.slice_seconds,
            look_seconds=self.look_seconds,
            characters=self.characters,
        )
        peers = beside_peers(trainings, self.rates)
        show(trainings, peers)
        parts = {"model", "shape", "batch_tokens", "seed", "precision", "guard"}
        return {
            "settings": self.model_dump(mode="json", exclude={"data", "out"}),
            "seed": recipe.seed,
            "made_with": made_with,
            "schedule_steps": SCHEDULE_STEPS,
            "recipe": recipe.model_dump(mode="json", include=parts)
            | {"optim": scheduled(recipe).model_dump(mode="json")},
            "peer_optim": peer_optim(1.0).model_dump(mode="json", exclude={"lr"}),
            "trainings": trainings,
            "peers": peers,
        }
