"""Any causal language model and its tokenizer, as evaluation asks for them.

Our model directories and what else `AutoModelForCausalLM` loads are read through one interface,
that of transformers, so that peers are measured by the same lines as ours.

Dimensions in this file
    B   rows
    T   tokens read now
    W   tokens in all, those of the cache first
    V   vocabulary
"""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mptbook.directory import find_directory
from mptbook.hf import bars_on_a_terminal_only  # mptbook.hf is imported so that "mpt" is ours
from mptbook.model.precision import Precision, autocast

MOST_TOKENS = 2048  # of models whose configuration does not say what they were trained on
LENGTHS = "max_seq_len", "max_position_embeddings", "n_positions", "n_ctx"


@dataclass
class Reader:
    """A model that reads ids and gives logits, and the tokenizer that makes the ids.

    Args:
        model: in evaluation mode.
        tokenizer: as `AutoTokenizer` loads it.
        precision: of products; see `mptbook.model.precision.autocast`.
        max_tokens: that are read at most, counting from the end; 0: as many as the configuration
            says that the model was trained on.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    precision: Precision = "auto"
    max_tokens: int = 0

    def __post_init__(self) -> None:
        self.model.eval()
        self.tokenizer.model_max_length = int(1e9)  # or it warns of texts that are cut here
        self._context: tuple[str, list[int]] = "", []
        takes = inspect.signature(self.model.forward).parameters
        self._positions = "position_ids" in takes
        self._keeps = "logits_to_keep" in takes
        if not self.max_tokens:
            said = (getattr(self.model.config, name, None) for name in LENGTHS)
            self.max_tokens = next((length for length in said if length), MOST_TOKENS)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def start(self) -> int:
        """What stands before a text that has no context: as in training, mostly end-of-text."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return bos if bos is not None else eos

    @property
    def ends(self) -> set[int]:
        """The ids that end what the model writes."""
        said = getattr(self.model.generation_config, "eos_token_id", None)
        said = said if isinstance(said, list) else [said]
        return {token for token in (*said, self.tokenizer.eos_token_id) if token is not None}

    def encode(self, text: str) -> list[int]:
        """The ids of a text that may begin a prompt; some tokenizers put one before it."""
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and of what follows it, as lm-evaluation-harness splits them.

        The two are read as one text, since a token may depend on what stands before it. Blanks
        at the end of the context go to the continuation: most tokenizers have words with a blank
        before them, and none after.
        """
        stripped = context.rstrip()
        continuation, context = context[len(stripped) :] + continuation, stripped
        if not context:
            return [self.start], self.tokenizer.encode(continuation, add_special_tokens=False)
        if context != self._context[0]:  # the options of a question have the same
            self._context = context, self.encode(context)
        before = self._context[1]
        after = self.encode(context + continuation)[len(before) :]
        # A continuation that melts into the last token of its context is read for itself.
        return before, after or self.tokenizer.encode(continuation, add_special_tokens=False)

    @torch.no_grad()
    def logits(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None, keep: int) -> Tensor:
        """(B, keep, V) logits after each of the last `keep` tokens.

        Args:
            ids: (B, T) int64.
            mask: (B, W) bool; False hides a token.
            cache: of the tokens before, extended in place; None reads without one.
        """
        told: dict = {"logits_to_keep": keep} if self._keeps else {}
        if self._positions:
            # Given, because padding on the left must not move what stands right of it.
            told["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with autocast(self.device, self.precision):
            output = self.model(
                input_ids=ids,
                attention_mask=mask.long(),
                past_key_values=cache,
                use_cache=cache is not None,
                **told,
            )
        return output.logits[:, -keep:]


def load_reader(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    precision: Precision = "auto",
    max_tokens: int = 0,
) -> Reader:
    """A reader of a model directory, a run, a .gguf file, or a name on the hub.

    Args:
        dtype: of the weights; None keeps that of the file.
        precision, max_tokens: see `Reader`.

    Raises:
        FileNotFoundError: if a path does not exist, or is no model directory.
        ValueError: if the files are not those of a causal model, or are .gguf and the package
            gguf is missing.
        ConnectionError: if a hub name cannot be fetched.
    """
    source, how = _source(path)
    dtype = "auto" if dtype is None else dtype
    try:
        with bars_on_a_terminal_only():
            tokenizer = AutoTokenizer.from_pretrained(source, **how)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **how)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        kind = ValueError if Path(source).exists() else ConnectionError
        raise kind(f"{path} cannot be loaded as a causal language model: {reason}") from error
    return Reader(model.to(device), tokenizer, precision, max_tokens)


def _source(path: str | Path) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` is to be given for a path or name."""
    file = Path(path)
    if file.suffix == ".gguf":
        if not file.exists():
            raise FileNotFoundError(f"{path} does not exist; give a .gguf file that does")
        try:
            import gguf  # noqa: F401
        except ImportError:
            raise ValueError(
                f"{path} is read with gguf, which is not here; pip install 'mptbook[eval]'"
            ) from None
        return str(file.parent), {"gguf_file": file.name}
    if not file.exists() and str(path).count("/") == 1:
        return str(path), {}  # the hub's; what `find_directory` fetches is for MPT only
    return str(find_directory(path)), {}
