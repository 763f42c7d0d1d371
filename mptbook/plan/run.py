"""A training run as figures: steps, memory, traffic, days, cost."""

from dataclasses import asdict

from mptbook.model.config import MPTConfig
from mptbook.plan.activations import recomputed_blocks
from mptbook.plan.advice import misfit
from mptbook.plan.costs import GPUS, SECONDS_PER_DAY, flops_per_token, parameters
from mptbook.plan.memory import Setup, largest_micro_batch, moments, reserve
from mptbook.plan.published import SOURCE, expected_mfu, nearest
from mptbook.plan.traffic import traffic


def training(
    config: MPTConfig,
    setup: Setup,
    gpu: str,
    *,
    batch_rows: int | None = None,
    tokens: float | None = None,
    mfu: float | None = None,
    price: float | None = None,
    name: str = "the model",
) -> dict:
    """The figures of a run on GPUs of the type `gpu`, a key of `GPUS`.

    Args:
        batch_rows: of a step, over all GPUs; None: as many as fit at once.
        tokens: of the whole run; None leaves out steps, days and cost.
        mfu: share of the peak rate; None: what the nearest published measurement gives. Where
            none is near, times are left out.
        price: dollars for one GPU and hour; None leaves out the cost.
        name: of the model, for error messages.

    Returns:
        `model`, `memory`, `step`, `traffic` and `speed`, `run` as far as known. `memory` has a
        `misfit` with the reason if not one row fits; what follows is left out then.

    Raises:
        ValueError: if the batch does not divide over the GPUs, or rows are longer than a table
            of learned positions.
    """
    _check(config, setup, batch_rows)
    flops, n_all = flops_per_token(config, setup.row_tokens), parameters(config)["total"]
    largest = largest_micro_batch(config, setup, GPUS[gpu])
    found: dict = {
        "setup": asdict(setup) | {"gpu": gpu, "shards": setup.n_shards},
        "model": {
            "parameters": n_all,
            "flops_per_token": flops,
            "attention_share": 1 - 6 * n_all / flops,
        },
    }
    each = largest if batch_rows is None else batch_rows // setup.gpus
    micro = max((n for n in range(1, largest + 1) if each % n == 0), default=1)
    found["memory"] = {
        "micro_rows": micro,
        "largest_micro_rows": largest,
        "moments": moments(config, setup, micro),
        "reserve": reserve(GPUS[gpu]),
        "of": GPUS[gpu].memory_bytes,
    }
    if not largest:
        found["memory"]["misfit"] = misfit(config, setup, gpu, name)
        return found
    step_tokens = setup.gpus * each * setup.row_tokens
    n_micro = each // micro
    found["step"] = {"rows": setup.gpus * each, "tokens": step_tokens, "micro_batches": n_micro}
    moved = traffic(config, setup)
    found["traffic"] = {"per_micro_batch": moved, "per_step": moved["total"] * n_micro}
    found |= _times(config, setup, gpu, found, mfu)
    if tokens is not None:
        found["run"] = {"tokens": tokens, "steps": tokens / step_tokens, "flops": tokens * flops}
        if "speed" in found:
            found["run"] |= _duration(found, setup.gpus, price)
    return found


def _check(config: MPTConfig, setup: Setup, batch_rows: int | None) -> None:
    if config.has_positions and setup.row_tokens > config.max_seq_len:
        raise ValueError(
            f"rows of {setup.row_tokens} tokens, but learned positions end at max_seq_len="
            f"{config.max_seq_len}; take shorter rows, or a model with ALiBi"
        )
    if batch_rows is not None and batch_rows % setup.gpus:
        down = batch_rows - batch_rows % setup.gpus
        ways = f"{down} or {down + setup.gpus}" if down else f"{setup.gpus}"
        raise ValueError(
            f"batch={batch_rows} rows do not divide over {setup.gpus} GPUs; take {ways}"
        )


def _times(config: MPTConfig, setup: Setup, gpu: str, found: dict, mfu: float | None) -> dict:
    share = recomputed_blocks(config, setup.recompute) / config.n_layers
    source, row = "given", None
    if mfu is None:
        row = nearest(config, gpu, setup.row_tokens, setup.gpus)
        if row is None:
            return {}
        mfu = expected_mfu(row, share)
        source = f"{SOURCE}: {100 * row.mfu:.2f} % for {row}"
    rate = mfu * GPUS[gpu].peak_flops
    flops = found["model"]["flops_per_token"]
    seconds = found["step"]["tokens"] * flops / (setup.gpus * rate)
    speed = {
        "mfu": mfu,
        "hfu": mfu * (1 + share / 3),
        "source": source,
        "tokens_per_second": setup.gpus * rate / flops,
        "step_seconds": seconds,
        # What links must sustain if they are not to be what the GPUs wait for.
        "traffic_bytes_per_second": found["traffic"]["per_step"] / seconds,
    }
    return {"speed": speed}


def _duration(found: dict, gpus: int, price: float | None) -> dict:
    seconds = found["run"]["tokens"] / found["speed"]["tokens_per_second"]
    hours = seconds / 3600 * gpus
    cost = {} if price is None else {"price": price, "cost": price * hours}
    return {"days": seconds / SECONDS_PER_DAY, "gpu_hours": hours} | cost
