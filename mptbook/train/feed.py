"""The batches of a run, stage by stage."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from mptbook import world
from mptbook.data.curriculum import Curriculum, Stage
from mptbook.data.loader import Drawn, Rows, batches, drawn
from mptbook.data.mixture import Mixture


class Feed:
    """A curriculum over a prepared folder.

    Args:
        data: folder that `mptbook prepare` wrote.
        seed: of the order of the rows. Each stage shuffles anew, so what one has read may come
            again in the next.
        micro_batch_tokens: tokens that a process takes at once; None takes its part of a batch.
        repeat: whether a row may come twice in a stage.

    Raises:
        ValueError: if curriculum and data do not fit together; `check` and `accumulate`, if the
            processes cannot share the batches of a stage.
    """

    def __init__(
        self,
        data: Path,
        curriculum: Curriculum,
        *,
        seed: int,
        micro_batch_tokens: int | None = None,
        repeat: bool = True,
    ) -> None:
        self.curriculum, self._seed = curriculum, seed
        self._micro_batch_tokens = micro_batch_tokens
        self.rows = [self._open(data, stage.row_tokens) for stage in curriculum.stages]
        self._mixtures = [
            Mixture(stage.mixture) if stage.mixture else None for stage in curriculum.stages
        ]
        for rows, mixture in zip(self.rows, self._mixtures, strict=True):
            _know(rows, mixture)
        if not repeat:
            self._once()

    def _open(self, data: Path, row_tokens: int) -> Rows:
        return Rows(data, row_tokens)

    @property
    def packed(self) -> bool:
        """Whether rows hold documents whole, to be kept apart."""
        return self.rows[0].packed

    def check(self, start: int, end: int) -> None:
        """See that the processes can share the batches of all steps from `start` to `end`.

        Those of other stages may be for another number of processes.
        """
        for number, _, first, _ in self.curriculum.parts(start):
            if first < end:
                self._at_once(number)

    def _at_once(self, number: int) -> int:
        stage = self.curriculum.stages[number]
        return _at_once(stage.batch_tokens, stage.row_tokens, self._micro_batch_tokens)

    def accumulate(self, number: int) -> int:
        """Micro-batches of a step in stage `number`, counted from 0."""
        at_once = self._at_once(number) * world.size()
        return self.curriculum.stages[number].batch_tokens // at_once

    def batches(
        self,
        number: int,
        *,
        start: int = 0,
        skipped: Sequence[int] = (),
        end_of_text: int | None = None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """The micro-batches of stage `number` for this process; all together take the rows
        that one alone would. See `mptbook.data.loader.batches`.

        Args:
            start: steps of the whole run that are taken.
            skipped: steps of the whole run, places in the order, whose batches are left out.
        """
        n, first = self.accumulate(number), self.curriculum.starts[number]
        rows = self.rows[number]
        return batches(
            rows,
            self._at_once(number) * world.size() // rows.row_tokens,
            seed=self._key(number),
            mixture=self._mixtures[number],
            start=(start - first) * n,
            skipped=[(place - first) * n + part for place in skipped for part in range(n)],
            end_of_text=end_of_text,
            rank=world.rank(),
            world=world.size(),
        )

    def drawn(self, number: int) -> list[Drawn]:
        """What stage `number` takes from each domain."""
        rows = self.rows[number]
        n_rows = self.curriculum.stages[number].tokens // rows.row_tokens
        return drawn(rows, n_rows, self._key(number), self._mixtures[number])

    def report(self) -> Iterator[tuple[int, Stage, list[Drawn]]]:
        """For each stage the step before it, and what it takes from each domain."""
        stages = zip(self.curriculum.starts, self.curriculum.stages, strict=True)
        for number, (first, stage) in enumerate(stages):
            yield first, stage, self.drawn(number)

    def _key(self, number: int) -> tuple[int, ...]:
        return (self._seed, number) if number else (self._seed,)

    def _once(self) -> None:
        for number in range(len(self.rows)):
            for domain in self.drawn(number):
                if domain.repeats:
                    there = domain.rows - domain.repeats
                    raise ValueError(
                        f"{domain.name} has {there:,} rows, and the run takes {domain.rows:,}; "
                        "give it less weight, train for fewer tokens, or allow --repeat"
                    )


def _know(rows: Rows, mixture: Mixture | None) -> None:
    """See that the rows have all domains of the mixture."""
    unknown = sorted(set(mixture.names if mixture else ()) - set(rows.domains))
    if unknown:
        raise ValueError(
            f"{rows.folder} has no domain {', '.join(unknown)}; it has {', '.join(rows.domains)}"
        )


def _at_once(batch_tokens: int, row_tokens: int, micro_batch_tokens: int | None) -> int:
    """Tokens of a micro-batch of one process."""
    processes = world.size()
    share, rest = divmod(batch_tokens, row_tokens * processes)
    if rest:
        raise ValueError(
            f"batch_tokens={batch_tokens} is {batch_tokens // row_tokens} rows of {row_tokens}, "
            f"which {processes} processes cannot share; take a multiple of "
            f"{row_tokens * processes} tokens, or another number of processes"
        )
    share *= row_tokens
    at_once = micro_batch_tokens or share
    if at_once % row_tokens:
        below = max(row_tokens, at_once - at_once % row_tokens)
        raise ValueError(
            f"micro_batch_tokens={at_once} is not a multiple of the {row_tokens} tokens of a "
            f"row; take {below}"
        )
    if share % at_once:
        below = max(at_once, share - share % at_once) * processes
        raise ValueError(
            f"batch_tokens={batch_tokens} is not a multiple of micro_batch_tokens="
            f"{micro_batch_tokens}{f' on each of {processes} processes' if processes > 1 else ''}; "
            f"take {below}"
        )
    return at_once
