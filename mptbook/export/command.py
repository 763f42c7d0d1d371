"""`mptbook export DIR --to TARGET --out OUT`: a model in another form, and what its engine says."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from mptbook.directory import find_directory, fresh_directory, read_config
from mptbook.export import ctranslate2, fastertransformer, gguf, hf, onnx, verify
from mptbook.infer.load import save_packed
from mptbook.settings import RunSettings
from mptbook.tokenizer.tokenizer import Tokenizer

Target = Literal["int8", "int4", "hf", "vllm", "onnx", "gguf", "ctranslate2", "fastertransformer"]
PACKED = {"int8": 8, "int4": 4}
ENGINES = {
    "hf": hf,
    "vllm": hf,
    "onnx": onnx,
    "gguf": gguf,
    "ctranslate2": ctranslate2,
    "fastertransformer": fastertransformer,
}
EXACT = ("float32", "f32")
MOST = 0.1  # nats, between our log-probability of a token and an engine's, both in float32


class Export(RunSettings):
    """Write a model in another form: `mptbook export DIR --to gguf --out OUT`."""

    model: CliPositionalArg[str] = Field(
        description="a model directory, a run, or a name on the hub"
    )
    to: Target = Field(
        description="int8 or int4: packed weights, for generate, ask, serve and evaluate. hf: "
        "for transformers' own MPT; vllm: for vLLM up to 0.28; onnx: for onnxruntime; gguf: for "
        "llama.cpp; ctranslate2; fastertransformer"
    )
    out: Path = Field(description="the new directory")
    dtype: str = Field(
        "", description="of the weights: q8_0 for gguf, say; none: the first that the target has"
    )
    gpus: PositiveInt = Field(1, description="that share each layer, for fastertransformer")
    verify: bool = Field(True, description="let the engine write, and compare with ours")

    def run(self) -> None:
        folder = find_directory(self.model)
        if self.out.resolve() == folder.resolve():
            raise ValueError(f"{self.out} is the model itself; give another folder")
        if self.gpus > 1 and self.to != "fastertransformer":
            raise ValueError(f"gpus is {self.gpus}; only fastertransformer cuts layers apart")
        if self.to in PACKED:
            self._pack(folder)
        else:
            self._export(folder, ENGINES[self.to])

    def _pack(self, folder: Path) -> None:
        if self.dtype:
            raise ValueError(f"dtype is {self.dtype!r}, but {self.to} says it all; leave it out")
        errors: dict[str, float] = {}
        save_packed(folder, self.out, PACKED[self.to], look=printing(errors))
        size = sum(file.stat().st_size for file in self.out.glob("*.safetensors*"))
        worst = max(errors, key=errors.__getitem__)
        print(f"{len(errors)} weights, {size / 1e6:,.1f} MB, in {self.out}")
        print(f"the most is lost of {worst}: {errors[worst]:.2%}")

    def _export(self, folder: Path, engine) -> None:
        dtype = self.dtype or engine.DTYPES[0]
        if dtype not in engine.DTYPES:
            raise ValueError(f"dtype is {dtype!r}; {self.to} has {' and '.join(engine.DTYPES)}")
        with fresh_directory(self.out, replace=False) as fresh:
            how = {"vllm": ("vllm",), "fastertransformer": (self.gpus,)}.get(self.to, ())
            try:
                engine.write(folder, fresh, dtype, *how)
            except OSError as error:
                if error.filename is not None or type(error) is not OSError:
                    raise  # it says what is the matter
                raise OSError(f"cannot write {self.out}: {error}") from error
            said = self._verified(folder, fresh, dtype) if self.verify else "not verified"
        size = sum(file.stat().st_size for file in self.out.rglob("*") if file.is_file())
        print(f"{self.to}, {dtype}, {size / 1e6:,.1f} MB, in {self.out}")
        print(said)

    def _verified(self, folder: Path, out: Path, dtype: str) -> str:
        """What there is to say of the export beside the model.

        Raises:
            ValueError: if an engine in float32 finds another likelihood than ours, or if one in
                any dtype finds none.
        """
        if self.to == "vllm":
            hf.read_config(out)
            return "transformers reads the configuration; start vLLM on it, and compare"
        if self.to == "fastertransformer":
            worst = fastertransformer.read_back(folder, out)
            return f"read back: weights differ by at most {worst:.1e}"
        config = read_config(folder)
        if config.max_seq_len < 2:
            return "not verified: nothing is to be written in texts of one token"
        tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
        asked = verify.some_prompt(tokenizer, config.max_seq_len, config.vocab_size)
        prompt, _ = asked
        written = ENGINES[self.to].greedy(out, *asked)
        found = verify.compared(folder, prompt, written)
        said = (
            f"of {found.tokens} tokens that {self.to} wrote, {found.same} are those that mptbook "
            f"finds likeliest, and none is more than {found.behind:.1e} nats behind those; "
        )
        told = any(log is not None for _, log in written)
        apart = f"log-probabilities differ by at most {found.difference:.1e} nats"
        said += apart if told else "it tells no log-probability of them"
        # No rounding makes what is no number.
        most = MOST if dtype in EXACT else sys.float_info.max
        if not (found.behind <= most and (found.difference <= most or not told)):
            raise ValueError(f"{said}; in {dtype} that is not rounding, so nothing is kept")
        return said


def printing(errors: dict[str, float]) -> Callable[[str, float], None]:
    """What notes and prints the error of each weight; see `mptbook.infer.quantize.quantize`."""

    def look(name: str, error: float) -> None:
        errors[name] = error
        print(f"  {name:45} {error:7.2%} lost")

    return look
