"""A plan on one page: `mptbook plan mpt-7b --gpus 8 --gpu a100-80`."""

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic_settings import CliPositionalArg

from mptbook.directory import find_directory, read_config
from mptbook.model.config import NAMED, MPTConfig
from mptbook.plan.costs import GIB, gpu_named
from mptbook.plan.memory import Setup
from mptbook.plan.run import training
from mptbook.plan.serving import BITS, serving
from mptbook.settings import RunSettings, check_figures

EVERY = {"none": 0, "block": 1}  # what --recompute may say beside a number


class Plan(RunSettings):
    """What a run costs before it starts: `mptbook plan mpt-30b --gpus 256 --gpu h100-80`."""

    model: CliPositionalArg[str] = Field(description="a named size, or a model directory")
    gpus: PositiveInt = Field(8, description="how many")
    gpu: str = Field("A100-80GB", description="which: a100-40, a100-80, h100-80, h200-141, l4, t4")
    seq: PositiveInt | None = Field(None, description="tokens of a row (default: the model's)")
    batch: PositiveInt | None = Field(
        None, description="rows of a step, over all GPUs (default: as many as fit at once)"
    )
    tokens: PositiveFloat | None = Field(None, description="of the whole run, e.g. 50e9")
    optimizer: str = Field("lion", description="lion or adamw")
    precision: str = Field("pure", description="full, default or pure: what is float32 still")
    recompute: str = Field("block", description="none, block, or k for every k-th block")
    shards: PositiveInt | None = Field(
        None, description="GPUs that share one copy of the weights (default: all)"
    )
    mfu: float | None = Field(
        None, gt=0, le=1, description="share of the peak rate (default: nearest measurement)"
    )
    price: PositiveFloat | None = Field(None, description="dollars for one GPU and hour")
    out: Path | None = Field(None, description="where to write the figures as JSON")

    def run(self) -> None:
        """Print the plan; what does not fit is printed as far as it goes, and then refused."""
        if self.out is not None:
            check_figures(self.out)
        figures = self.figures()
        print("\n".join(lines(figures)))
        if self.out is not None:
            self.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            print(f"written to {self.out}")
        if "misfit" in figures["memory"]:
            raise ValueError(figures["memory"]["misfit"])

    def figures(self) -> dict:
        """The plan as numbers: what `training` and `serving` find."""
        config = config_of(self.model)
        row_tokens = self.seq or config.max_seq_len
        how = self.optimizer, self.precision, every_block(self.recompute), self.shards
        found = training(
            config,
            Setup(self.gpus, row_tokens, *how),
            gpu_named(self.gpu),
            batch_rows=self.batch,
            tokens=self.tokens,
            mfu=self.mfu,
            price=self.price,
            name=self.model,
        )
        answers = [asdict(serving(config, row_tokens, bits)) for bits in BITS]
        return {"name": self.model} | found | {"serving": answers}


def config_of(model: str) -> MPTConfig:
    """The configuration of a named size, or of a model directory on this machine."""
    if model not in NAMED and Path(model).exists():
        return read_config(find_directory(model))
    return MPTConfig.named(model)


def every_block(recompute: str) -> int:
    """The `recompute` of a `Setup` from what the flag says.

    Raises:
        ValueError: if it is neither none, block, nor a number above 0.
    """
    if recompute in EVERY:
        return EVERY[recompute]
    if recompute.isdigit() and int(recompute):
        return int(recompute)
    raise ValueError(
        f"recompute is {recompute!r}; it must be none, block, or a number k for every k-th block"
    )


def lines(figures: dict) -> list[str]:
    """A plan in words and columns."""
    setup, model = figures["setup"], figures["model"]
    again = {0: "nothing recomputed", 1: "every block recomputed"}.get(
        setup["recompute"], f"one block in {setup['recompute']} recomputed"
    )
    copies = setup["gpus"] // setup["shards"]
    page = [
        f"{figures['name']} on {setup['gpus']} x {setup['gpu']}, rows of {setup['row_tokens']:,} "
        f"tokens, {setup['optimizer']}, precision {setup['precision']}, {again}"
        + (f", {copies} copies of the weights" if copies > 1 else ""),
        f"  {model['parameters']:,} parameters; {model['flops_per_token'] / 1e9:.1f} GFLOPs a "
        f"token, {model['attention_share']:.0%} of them in attention",
        *_memory(figures["memory"]),
    ]
    if "step" in figures:
        page += _step(figures)
    return page + _serving(figures)


def _memory(of: dict) -> list[str]:
    rows = "1 row" if of["micro_rows"] == 1 else f"{of['micro_rows']} rows"
    loss, backward = of["moments"]["loss"], of["moments"]["backward"]
    page = [f"GiB on one GPU with {rows} at once      at the loss   going back"]
    for part in loss:
        page.append(f"  {part:34}{loss[part] / GIB:10.1f}{backward[part] / GIB:13.1f}")
    page.append(
        f"  of {of['of'] / GIB:.0f}, of which {of['reserve'] / GIB:.1f} are left to CUDA and "
        f"to gaps (assumed); largest micro-batch: {of['largest_micro_rows']}"
    )
    return page


def _step(figures: dict) -> list[str]:
    step, moved = figures["step"], figures["traffic"]
    kinds = {kind: size for kind, size in moved["per_micro_batch"].items() if size}
    sent = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in kinds.items()) or "nothing"
    page = [
        f"a step: {step['rows']:,} rows, {step['tokens']:,} tokens; on each GPU "
        f"{step['micro_batches']} x {figures['memory']['micro_rows']} rows",
        f"  each GPU sends, GB for a micro-batch: {sent}; {moved['per_step'] / 1e9:.1f} a step",
    ]
    if speed := figures.get("speed"):
        page += [
            f"  MFU {speed['mfu']:.1%}, HFU {speed['hfu']:.1%}: {speed['source']}",
            f"  {speed['tokens_per_second']:,.0f} tokens/s, {speed['step_seconds']:.2f} s a step; "
            f"each GPU sends {speed['traffic_bytes_per_second'] / 1e9:.1f} GB/s",
        ]
    else:
        name = figures["setup"]["gpu"]
        page.append(f"  no time: nothing published was measured on {name}; give --mfu")
    if run := figures.get("run"):
        page.append(
            f"the run: {run['tokens']:.4g} tokens, {run['steps']:,.0f} steps, "
            f"{run['flops']:.2e} FLOPs"
        )
        if "days" in run:
            cost = f", ${run['cost']:,.0f}" if "cost" in run else ""
            page.append(f"  {run['days']:.2f} days, {run['gpu_hours']:,.0f} GPU hours{cost}")
    return page


def _serving(figures: dict) -> list[str]:
    page = [f"to answer about one text of {figures['setup']['row_tokens']:,} tokens"]
    for answer in figures["serving"]:
        weights, cache = answer["weights"] / GIB, answer["cache"] / GIB
        held = " ".join(answer["held_by"]) or "no single GPU"
        page.append(
            f"  {answer['bits']:2} bits: weights {weights:.1f} GiB, cache {cache:.1f} GiB at "
            f"{answer['cache_per_token'] / 1024:,.0f} KiB a token; held by {held}"
        )
    return page
