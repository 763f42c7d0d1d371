"""The course of a run, from the first step to the model directory: what all training shares."""

from collections.abc import Iterator
from pathlib import Path
from signal import SIGINT
from typing import ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from mptbook import world
from mptbook.fsdp import Sharding
from mptbook.model.precision import Precision, resolved
from mptbook.settings import RunSettings
from mptbook.train.allocator import keep_freed_memory
from mptbook.train.checkpoint import Writer, checkpoints
from mptbook.train.guard import GuardSettings
from mptbook.train.log import RunLog
from mptbook.train.loop import StepLog, train_steps
from mptbook.train.optimizer import Optim
from mptbook.train.run import Run
from mptbook.train.rundir import claim, locked, write_settings
from mptbook.train.stop import Stop, Stopped, stop_after_step
from mptbook.train.supervise import supervise


class Training(RunSettings):
    """What every verb that trains can be told; it says in `train` how it makes its run."""

    verb: ClassVar[str]

    out: Path = Field(description="run directory to write")
    steps: NonNegativeInt = Field(4800, description="optimizer steps")
    until: PositiveInt | None = Field(
        None, description="stop after this step, saved, e.g. to go on with another number of GPUs"
    )
    batch_tokens: PositiveInt = Field(524_288, description="tokens per step")
    micro_batch_tokens: PositiveInt | None = Field(
        None, description="tokens that a process takes at once; the rest accumulates (default: all)"
    )
    optim: Optim = Optim()
    guard: GuardSettings = GuardSettings()
    seed: int = Field(17, description="of the initial weights and the order of the data")
    precision: Precision = Field("auto", description="auto: bf16 where the device has units for it")
    recompute: NonNegativeInt = Field(
        0, description="of every so many blocks one recomputes its activations; 1: all, 0: none"
    )
    fsdp: Sharding = Sharding()
    device: str = Field("auto", description="cpu, cuda, or auto")
    patience: PositiveInt = Field(
        600, description="seconds that a process waits for another, under torchrun"
    )
    heldout_every: PositiveInt = Field(1000, description="steps between held-out measures")
    save_every: PositiveInt = Field(1000, description="steps between checkpoints")
    keep: PositiveInt = Field(2, description="checkpoints kept")
    resume: bool = Field(False, description="go on from the newest good checkpoint in --out")
    supervise: bool = Field(
        False, description="train in a second process, and resume when it crashes or hangs"
    )
    restarts: NonNegativeInt = Field(8, description="how often --supervise resumes at most")
    silence: PositiveInt = Field(
        3600, description="seconds without a line in the log that --supervise takes for a hang"
    )

    @property
    def end(self) -> int:
        """The step after which the run stops, for now or for good."""
        return min(self.until or self.steps, self.steps)

    def run(self) -> None:
        if self.supervise and world.launched():
            raise ValueError(
                "supervise is for a process alone; torchrun starts its processes again itself: "
                "torchrun --max-restarts 8 ... --resume"
            )
        if self.supervise:
            supervise(self.verb, self)
            return
        with world.joined(world.device(self.device), self.patience):
            self.train()

    def train(self) -> Path:
        raise AssertionError(f"{type(self).__name__} does not say how it trains")


def train(settings: Training, run: Run) -> Path:
    """Train, log and save; the path of the finished model directory, `out/model`, or of the run
    directory, where `until` stopped the run before.

    Where torchrun started several processes, all call this at once, inside `world.joined`; the
    first one writes and prints.

    Ctrl-C and SIGTERM end the run after the step it is in, with a checkpoint.

    Args:
        run: its parts, as they are before the first step.

    Raises:
        ValueError: if run and checkpoint do not fit together.
        FileExistsError: if `out` holds something else, or is being written by another process.
        OSError: if the disk does not take the first checkpoint, or the last.
        KeyboardInterrupt: after Ctrl-C, when the checkpoint is written.
        Stopped: after SIGTERM, likewise.
        Diverged: if the loss left its course more often than `guard.rollbacks`.
    """
    world.from_first(lambda: claim(settings))
    with locked(settings.out):
        step, damaged = run.restore(settings.out)
        resumed = world.from_first(lambda: bool(checkpoints(settings.out)))
        if step > settings.steps:
            raise ValueError(
                f"{settings.out} has taken {step:,} steps, more than steps={settings.steps:,}; go "
                "on with as many or more, or choose another --out"
            )
        if not resumed and world.from_first((settings.out / "model").exists):
            raise ValueError(
                f"{settings.out} has a model and no checkpoint to go on from; choose another --out"
            )
        world.from_first(lambda: write_settings(settings.out, settings))
        keep_freed_memory()
        with (
            RunLog(settings.out, settings.steps, step, quiet=world.rank() > 0) as log,
            Writer(settings.out, settings.keep, settings.patience) as writer,
            stop_after_step() as stop,
        ):
            computed_in = resolved(run.model.device, settings.precision)
            log.event(
                "started", step, resumed=resumed, precision=computed_in, processes=world.size()
            )
            run.begin(log)
            for first, stage, domains in run.feed.report():
                log.stage(first, stage, domains)
            for path, what in damaged:
                log.event("damaged", step, path=path.name, what=what)
                log.say(f"{path} is damaged and passed over: {what}")
            if not resumed:  # a disk that cannot hold one is found now
                writer.write(run.snapshot(0))
                _report(writer, log, insist=True)
            while step < settings.end:  # once, and again after each rollback
                step = _train(settings, run, step, log, writer, stop)
            _report(writer, log, insist=True)
            if step < settings.steps:
                log.event("stopped", step, by="until")
                log.say(f"step {step:,} of {settings.steps:,}, saved; go on with --resume")
                return settings.out
            run.look_at_all(log, settings.steps)
            run.finish(settings.out, settings.out / f"step-{settings.steps:06d}")
            log.say(f"model directory: {settings.out / 'model'}")
    return settings.out / "model"


def _train(
    settings: Training, run: Run, start: int, log: RunLog, writer: Writer, stop: Stop
) -> int:
    """Train from a step on; the last step, or the one that the run went back to."""
    due = False
    for taken in staged_steps(settings, run, start):
        log.step(taken)
        step, last = taken.step, taken.step == settings.end
        stop.agree()
        if run.guard.must_go_back:
            _report(writer, log, wait=True)
            return _go_back(settings.out, run, taken, log)
        if step % settings.heldout_every == 0 or last:
            run.look(log, step)
        due = due or step % settings.save_every == 0
        # Not while steps are being refused: the weights may be the reason.
        if (due and not run.guard.refused) or last or stop.by:
            _report(writer, log, wait=True)
            writer.write(run.snapshot(step))
            due = False
        _report(writer, log)
        if stop.by and not last:
            _report(writer, log, insist=True)
            _leave(stop, step, log)
    return settings.end


def staged_steps(settings: Training, run: Run, start: int) -> Iterator[StepLog]:
    """The training steps after `start`, stage by stage."""
    rates = settings.optim.rates(settings.steps)
    for number, stage, first, end in run.feed.curriculum.parts(start):
        if first >= settings.end:
            return
        begin = max(start, first)
        if begin == first:
            run.guard.forget()  # other rows have other losses: a jump is no spike
        stream = run.feed.batches(
            number, start=begin, skipped=run.guard.skipped, end_of_text=run.end_of_document
        )
        yield from train_steps(
            run.model,
            stream,
            run.optimizer,
            lambda step, factor=stage.lr: factor * rates(step),
            steps=min(end, settings.end),
            start=begin,
            accumulate=run.feed.accumulate(number),
            clip=settings.optim.clip,
            precision=settings.precision,
            guard=run.guard,
        )


def _go_back(out: Path, run: Run, taken: StepLog, log: RunLog) -> int:
    """Restore the newest good checkpoint from before the trouble; its step."""
    safe = run.guard.first_suspect(taken.step) - 1
    skipped = run.guard.go_back(taken.step)
    step = run.go_back(out, safe)
    log.event("rollback", taken.step, to=step, skipped=skipped, reason=taken.refused)
    log.say(
        f"step {taken.step:,}  back to step {step:,}, leaving out {len(skipped)} batches: "
        f"{taken.refused}"
    )
    return step


def _report(writer: Writer, log: RunLog, wait: bool = False, insist: bool = False) -> None:
    """Log what became of a checkpoint. Without `insist` the run goes on where one failed."""
    for step, outcome in writer.outcomes(wait or insist):
        if isinstance(outcome, Path):
            log.event("saved", step, path=outcome.name)
            continue
        log.event("unsaved", step, error=str(outcome))
        log.say(f"step {step:,}  no checkpoint: {outcome}")
        if insist:
            raise outcome


def _leave(stop: Stop, step: int, log: RunLog) -> None:
    log.event("stopped", step, by=stop.by.name)
    message = f"stopped after step {step:,}, saved; go on with the same command and --resume"
    if stop.by == SIGINT:
        log.say(message)
        raise KeyboardInterrupt
    raise Stopped(message)
