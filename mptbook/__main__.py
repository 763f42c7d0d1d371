"""The command line: `mptbook VERB [settings]`."""

import importlib
import os
import sys

from pydantic import ValidationError

from mptbook.settings import Ended, first_mistake

VERBS = {
    "corpora": ("mptbook.data.corpora", "Corpora", "fetch the default texts; list them"),
    "tokenizer": ("mptbook.data.vocabulary", "LearnTokenizer", "learn a byte-level BPE"),
    "prepare": ("mptbook.data.prepare", "Prepare", "turn texts into packed rows of tokens"),
    "pretrain": ("mptbook.train.pretrain", "Pretrain", "train a model"),
    "finetune": ("mptbook.finetune.sft", "Finetune", "teach a model to answer"),
    "merge": ("mptbook.finetune.lora", "Merge", "a model directory of a model and its adapters"),
    "history": ("mptbook.train.history", "History", "what happened to a run"),
    "consolidate": ("mptbook.train.checkpoint", "Consolidate", "a model directory of a checkpoint"),
    "generate": ("mptbook.infer.generate", "Generate", "continue a prompt"),
    "evaluate": ("mptbook.eval.command", "Evaluate", "bits per byte, or a suite of tasks"),
    "ask": ("mptbook.infer.chat", "Ask", "put a question to a finetuned model"),
    "serve": ("mptbook.serve.command", "Serve", "answer over HTTP, as OpenAI's servers do"),
    "longcontext": ("mptbook.eval.longcontext", "LongContext", "what a model makes of long texts"),
    "prefer": ("mptbook.finetune.preference", "Preference", "learn which answers people like"),
    "export": ("mptbook.export.command", "Export", "write a model in another form"),
    "plan": ("mptbook.plan.command", "Plan", "memory, days and cost of a run, beforehand"),
    "bench attention": ("mptbook.bench.attention", "BenchAttention", "attention beside its peers"),
    "bench norms": ("mptbook.bench.norms", "BenchNorms", "norms in full and low precision"),
    "bench positions": ("mptbook.bench.positions", "BenchPositions", "train short, test long"),
    "bench optimizers": ("mptbook.bench.optimizers", "BenchOptimizers", "a step of Lion and peers"),
    "bench sweep": ("mptbook.bench.sweep", "BenchSweep", "Lion, AdamW and SGD over a grid"),
    "bench precision": ("mptbook.bench.precision", "BenchPrecision", "train with either norm"),
    "bench recipe": ("mptbook.bench.recipe", "BenchRecipe", "parts of mpt-tiny's recipe left out"),
    "bench curriculum": ("mptbook.bench.curriculum", "BenchCurriculum", "short rows, then long"),
    "bench storywriter": ("mptbook.bench.storywriter", "BenchStoryWriter", "long rows after short"),
    "bench packing": ("mptbook.bench.packing", "BenchPacking", "documents in rows, and what fills"),
    "bench preference": ("mptbook.bench.preference", "BenchPreference", "what preferences change"),
    "bench speedrun": ("mptbook.bench.speedrun", "BenchSpeedrun", "loss after the same time"),
    "bench train": ("mptbook.bench.train", "BenchTrain", "training steps beside their peers"),
    "bench context": ("mptbook.bench.context", "BenchContext", "train on longer and longer rows"),
    "bench fsdp": ("mptbook.bench.fsdp", "BenchFSDP", "what a process holds of a sharded model"),
    "bench generate": ("mptbook.bench.generate", "BenchGenerate", "tokens a second beside peers"),
    "bench serve": ("mptbook.bench.serve", "BenchServe", "a server asked one by one and at once"),
    "bench evaluate": ("mptbook.bench.evaluate", "BenchEvaluate", "tasks put to three models"),
    "bench finetune": ("mptbook.bench.finetune", "BenchFinetune", "learn to answer; before, after"),
    "bench prepare": ("mptbook.bench.prepare", "BenchPrepare", "texts to rows on disk"),
    "bench tokenizer": ("mptbook.bench.tokenizer", "BenchTokenizer", "text to ids and back"),
}


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {what}" for verb, (_, _, what) in VERBS.items())
    return f"""usage: mptbook VERB [--config FILE.toml] [--setting value ...]

{verbs}

mptbook VERB --help lists the settings of a verb."""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. Exit code 2 and one line for what the user got wrong."""
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:  # also where argparse exits, after --help
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130  # as a shell counts it: 128 + SIGINT
    except (ValueError, OSError, Ended) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141  # 128 + SIGPIPE
        if os.environ.get("MPTBOOK_TRACEBACK"):
            raise
        if str(error):
            _wait_to_speak(error)
            said = first_mistake(error) if isinstance(error, ValidationError) else error
            print(f"error: {said}", file=sys.stderr)
        return _exit_code(error)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb == "bench" and rest:
        verb, rest = f"bench {rest[0]}", rest[1:]
    if verb not in VERBS:
        print(f"error: {verb} is not a verb; mptbook has {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module, name, _ = VERBS[verb]
    settings = getattr(importlib.import_module(module), name)
    settings.from_command_line(verb, rest).run()
    return 0


def _nobody_reads() -> bool:
    """Whether who read standard output has left, as `head` does; nothing more is written then."""
    try:
        print(flush=True)  # the pipe that broke may be another: a worker's, a connection's
    except BrokenPipeError:
        # What is left would be tried again, and complained about, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _wait_to_speak(error: Exception) -> None:
    """What happens to all processes that torchrun started is told once."""
    if "RANK" in os.environ:
        from mptbook import world  # imports torch, which a misspelt setting need not wait for

        world.wait_to_speak(error)


def _exit_code(error: Exception) -> int:
    """2 for what the user got wrong, 1 for a disk or network that did not do its part."""
    if isinstance(error, Ended):
        return error.code
    mistakes = (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        PermissionError,
        NotADirectoryError,
        IsADirectoryError,
        ConnectionError,
    )
    return 2 if isinstance(error, mistakes) else 1


if __name__ == "__main__":
    sys.exit(main())
