"""Measured utilisation: what llm-foundry reached on its example models, and the nearest to a plan.

The table is public: github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md, in two
versions of which the newer has the largest numbers of GPUs. Columns: size, tokens of a row, GPUs,
MFU in percent, rows of a micro-batch, tokens per second and GPU, and `r` where all blocks were
recomputed. The A100-40GB rows are of precision `pure`, the others of `default`.
"""

from dataclasses import dataclass
from functools import cache
from math import log

from mptbook.model.config import MPTConfig
from mptbook.plan.costs import GPUS, parameters

SOURCE = "llm-foundry, scripts/train/benchmarking/README.md"
SHAPES = {  # width, heads, layers
    "125m": (768, 12, 12),
    "350m": (1024, 16, 24),
    "760m": (1536, 12, 24),
    "1b": (2048, 16, 24),
    "3b": (2560, 20, 32),
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 56, 48),
    "70b": (8192, 64, 80),
}
TABLE = {
    "H100-80GB": """
70b 2048 512 41.25 8 1007 r | 70b 2048 256 42.42 8 1035 r | 70b 2048 128 43.36 8 1058 r
70b 2048 64 42.57 8 1039 r | 70b 2048 32 36.15 2 882 r | 30b 8192 8 29.92 1 1384 r
30b 4096 8 35.86 1 1802 r | 30b 2048 512 40.27 8 2115 r | 30b 2048 256 40.89 8 2148 r
30b 2048 128 41.85 8 2199 r | 30b 2048 32 43.92 14 2308 r | 30b 2048 16 43.07 10 2263 r
30b 2048 8 38.11 3 2002 r | 30b 1024 8 38.76 6 2084 r | 13b 32768 8 31.68 1 1976 r
13b 16384 8 35.55 3 2985 r | 13b 4096 8 41.6 10 4717 r | 13b 2048 512 41.12 16 4952 r
13b 2048 256 41.42 16 4989 r | 13b 2048 128 42.18 16 5080 r | 13b 2048 64 39.86 2 4800
13b 2048 32 39.95 2 4811 | 13b 2048 16 39.58 2 4767 | 13b 2048 8 39.79 2 4792
13b 1024 8 44.27 40 5502 r | 7b 65536 8 28.59 1 1956 r | 7b 32768 8 30.94 2 3318 r
7b 8192 8 37.14 8 6935 r | 7b 4096 8 40.42 16 8611 r | 7b 2048 512 42.2 6 9670
7b 2048 256 44.15 6 10119 | 7b 2048 128 45.71 6 10475 | 7b 2048 8 46.44 6 10643
7b 1024 8 42.83 64 10203 r | 3b 65536 8 26.81 1 3262 r | 3b 32768 8 28.84 3 5873 r
3b 16384 8 36.34 1 11152 | 3b 8192 8 40.31 3 16578 | 3b 4096 8 42.31 5 20964
3b 2048 64 40.8 6 22525 | 3b 2048 32 41.7 6 23021 | 3b 2048 16 43.73 10 24142
3b 1024 8 46.2 20 27046 | 1b 65536 8 26.34 1 5506 r | 1b 32768 8 33.54 1 12025
1b 16384 8 35.22 2 19649 | 1b 8192 8 37.73 3 29157 | 1b 4096 8 40.26 7 38535
1b 2048 64 40.85 20 44402 | 1b 2048 32 41.52 20 45130 | 1b 2048 16 42.36 20 46037
1b 2048 8 41.82 14 45455 | 1b 1024 8 41.95 18 48910 | 760m 32768 8 31.84 1 16291
760m 16384 8 33.57 3 27815 | 760m 8192 8 34.84 6 41825 | 760m 4096 8 35.83 12 55459
760m 2048 32 37.57 24 67971 | 760m 2048 16 37.89 24 68551 | 760m 2048 8 34.9 24 63147
760m 1024 8 39.76 48 78581
""",
    "A100-80GB": """
70b 2048 64 53.33 8 410 r | 70b 2048 32 48.56 2 373 r | 30b 8192 8 39.38 1 574 r
30b 4096 8 51.37 1 814 r | 30b 2048 8 55.3 3 916 r | 30b 1024 8 55.82 6 946 r
13b 32768 8 51.69 1 1016 r | 13b 16384 8 54.07 3 1431 r | 13b 8192 8 56.07 5 1795 r
13b 4096 8 57.62 10 2060 r | 13b 2048 8 59.57 2 2262 | 13b 1024 8 59.48 40 2330 r
7b 65536 8 46.97 1 1013 r | 7b 32768 8 49.46 2 1672 r | 7b 16384 8 51.96 4 2453 r
7b 8192 8 54.47 8 3206 r | 7b 4096 8 54.84 16 3684 r | 7b 2048 8 64.23 6 4641
7b 1024 8 58.01 64 4357 r | 3b 65536 8 46.05 1 1767 r | 3b 32768 8 47.18 3 3029 r
3b 16384 8 57.13 1 5529 | 3b 8192 8 59.34 3 7695 | 3b 4096 8 60.53 5 9457
3b 2048 8 62.11 10 10811 | 3b 1024 8 62.73 20 11580 | 1b 65536 8 46.18 1 3044 r
1b 32768 8 55.52 1 6275 | 1b 16384 8 56.6 2 9956 | 1b 8192 8 56.69 3 13814
1b 4096 8 59.0 7 17807 | 1b 2048 8 59.86 14 20513 | 1b 1024 8 60.15 18 22112
760m 65536 8 45.34 1 4143 r | 760m 32768 8 54.57 1 8802 | 760m 16384 8 54.64 3 14274
760m 8192 8 55.31 6 20933 | 760m 4096 8 56.05 12 27351 | 760m 2048 8 56.85 24 32434
760m 1024 8 47.76 48 29765 | 350m 65536 8 52.7 1 7524 | 350m 32768 8 52.46 2 13652
350m 16384 8 53.28 4 23559 | 350m 8192 8 53.8 8 36569 | 350m 4096 8 53.31 16 49555
350m 2048 8 51.62 32 58782 | 350m 1024 8 50.51 64 64813 | 125m 65536 8 54.13 1 20368
125m 32768 8 52.71 2 36407 | 125m 16384 8 50.61 4 60040 | 125m 8192 8 48.85 8 90392
125m 4096 8 46.08 16 118396 | 125m 2048 8 44.79 40 142830 | 125m 1024 8 43.15 64 156468
""",
    "A100-40GB": """
70b 2048 128 48.91 4 376 r | 70b 2048 64 35.87 2 276 r | 30b 2048 128 52.25 6 865 r
30b 2048 32 51.74 4 857 r | 13b 8192 8 43.95 1 1407 r | 13b 4096 8 44.85 2 1603 r
13b 2048 128 51.93 16 1972 r | 13b 2048 64 52.04 16 1976 r | 13b 2048 32 52.62 14 1998 r
13b 2048 16 52.5 10 1993 r | 13b 2048 8 43.94 4 1668 r | 13b 1024 8 44.07 8 1727 r
7b 16384 8 47.65 1 2249 r | 7b 8192 8 49.04 3 2887 r | 7b 4096 8 50.11 6 3366 r
7b 2048 128 50.14 18 3623 r | 7b 2048 64 50.73 18 3665 r | 7b 2048 32 51.55 18 3725 r
7b 2048 16 50.44 16 3645 r | 7b 2048 8 50.92 12 3679 r | 7b 1024 8 51.31 24 3854 r
3b 32768 8 46.03 1 2955 r | 3b 16384 8 46.14 2 4465 r | 3b 8192 8 55.13 1 7149
3b 4096 8 56.18 2 8777 | 3b 2048 128 54.8 6 9538 | 3b 2048 64 55.94 6 9736
3b 2048 32 56.96 6 9914 | 3b 2048 16 56.02 5 9750 | 3b 2048 8 57.82 5 10065
3b 1024 8 58.14 10 10731 | 1b 32768 8 45.07 1 5095 r | 1b 16384 8 55.23 1 9715
1b 8192 8 55.29 2 13474 | 1b 4096 8 55.85 4 16856 | 1b 2048 128 54.41 10 18647
1b 2048 64 55.44 10 19001 | 1b 2048 16 55.69 8 19085 | 1b 2048 8 56.23 8 19271
1b 1024 8 57.02 16 20959 | 760m 32768 8 44.53 1 7183 r | 760m 16384 8 53.26 1 13914
760m 8192 8 53.12 3 20106 | 760m 4096 8 53.0 6 25863 | 760m 2048 128 50.73 12 28940
760m 2048 8 52.89 12 30173 | 350m 32768 8 51.55 1 13416 | 350m 8192 8 51.39 4 34933
350m 2048 128 45.61 18 51934 | 350m 2048 8 49.17 16 55995 | 125m 32768 8 47.27 1 32651
125m 8192 8 46.94 5 86858 | 125m 2048 128 38.86 26 123936 | 125m 2048 8 42.75 26 136334
""",
}


@dataclass(frozen=True)
class Measured:
    """A row of the table."""

    gpu: str
    size: str
    row_tokens: int
    gpus: int
    mfu: float  # share, 0 to 1
    micro_rows: int
    tokens_per_second_per_gpu: int  # cut to a whole number by its authors
    recomputed: bool

    @property
    def config(self) -> MPTConfig:
        """The model that ran: learned positions and biases, unlike the released ones."""
        d_model, n_heads, n_layers = SHAPES[self.size]
        config = MPTConfig(d_model=d_model, n_heads=n_heads, n_layers=n_layers, no_bias=False)
        return config.replace(alibi=False, vocab_size=50_368, max_seq_len=self.row_tokens)

    @property
    def hfu(self) -> float:
        """MFU with the second forward pass counted, as the table counts it."""
        return self.mfu * (4 / 3 if self.recomputed else 1)

    def __str__(self) -> str:
        how = "recomputed" if self.recomputed else "nothing recomputed"
        return f"{self.size}, rows of {self.row_tokens:,}, {self.gpus} x {self.gpu}, {how}"


@cache
def measured() -> tuple[Measured, ...]:
    """All rows of the table."""
    found = []
    for gpu, text in TABLE.items():
        for line in text.replace("\n", "|").split("|"):
            if line.strip():
                size, row, gpus, percent, micro, speed, *again = line.split()
                numbers = int(row), int(gpus), float(percent) / 100, int(micro), int(speed)
                found.append(Measured(gpu, size, *numbers, bool(again)))
    return tuple(found)


def nearest(config: MPTConfig, gpu: str, row_tokens: int, gpus: int) -> Measured | None:
    """The measurement to plan by: the GPU's own if there is one, else one of the same peak rate.

    Of these the nearest in size, then in the length of the row, then in the number of GPUs, each
    as a ratio. None if no such GPU was measured.
    """
    same = [row for row in measured() if row.gpu == gpu]
    alike = [row for row in measured() if GPUS[row.gpu].peak_flops == GPUS[gpu].peak_flops]

    def distance(row: Measured) -> tuple[float, ...]:
        ours, theirs = (_in_blocks(c) for c in (config, row.config))
        pairs = (ours, theirs), (row_tokens, row.row_tokens), (gpus, row.gpus)
        return tuple(round(abs(log(a / b)), 6) for a, b in pairs)

    return min(same or alike, key=distance, default=None)


def _in_blocks(config: MPTConfig) -> int:
    parts = parameters(config)
    return parts["attention"] + parts["mlp"]


def expected_mfu(row: Measured, recomputed_share: float) -> float:
    """The MFU of a plan that keeps the hardware as busy as `row` did.

    What a GPU does per second stays; which part of it is a second forward pass does not.

    Args:
        recomputed_share: of the blocks, 0 to 1.
    """
    return row.hfu / (1 + recomputed_share / 3)
