"""`mptbook export DIR --to int8 --out OUT`: a model in another form."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field
from pydantic_settings import CliPositionalArg

from mptbook.directory import find_directory
from mptbook.infer.load import save_packed
from mptbook.settings import RunSettings

Target = Literal["int8", "int4"]
BITS = dict(zip(get_args(Target), (8, 4), strict=True))


class Export(RunSettings):
    """Write a model in another form: `mptbook export DIR --to int8 --out OUT`."""

    model: CliPositionalArg[str] = Field(
        description="a model directory, a run, or a name on the hub"
    )
    to: Target = Field(description="int8 or int4: packed weights, for generate, ask and serve")
    out: Path = Field(description="the new directory")

    def run(self) -> None:
        folder = find_directory(self.model)
        if self.out.resolve() == folder.resolve():
            raise ValueError(f"{self.out} is the model itself; give another folder")
        errors: dict[str, float] = {}
        save_packed(folder, self.out, BITS[self.to], look=printing(errors))
        size = sum(file.stat().st_size for file in self.out.glob("*.safetensors*"))
        worst = max(errors, key=errors.__getitem__)
        print(f"{len(errors)} weights, {size / 1e6:,.1f} MB, in {self.out}")
        print(f"the most is lost of {worst}: {errors[worst]:.2%}")


def printing(errors: dict[str, float]) -> Callable[[str, float], None]:
    """What notes and prints the error of each weight; see `mptbook.infer.quantize.quantize`."""

    def look(name: str, error: float) -> None:
        errors[name] = error
        print(f"  {name:45} {error:7.2%} lost")

    return look
