"""What `hata demo` is asked for."""

from dataclasses import dataclass
from pathlib import Path

import torch

from hata.checks import check
from hata.config import HataConfig
from hata.device import torch_device, torch_dtype

WHERE = "demo"


@dataclass(frozen=True)
class DemoOptions:
    """The options of `hata demo`, checked as far as no model is needed for it.

    Attributes:
        model: A local transformers folder of a Llama-family model; None is the bundled model.
        context: Tokens of prompt and answer together.
        depth: Where in the prose the fact stands, 0 to 1.
        top_k: Positions that each KV head attends to.
        weights: File of hash weights, or "random"; None is the package's own for the model.
        num_bits: Bits of a key's code; None is what the weights have.
        query_bits: Bits of a query's projection; None is what the weights were trained for.
        seed: Seed of random hash weights and of the fact.
        max_new_tokens: The longest answer.
        device: Where to run; None is a GPU where there is one.
        dtype: float32, bfloat16 or float16; None is float32 on a CPU and bfloat16 on a GPU.
        plot: PNG file for the attention mass.

    Raises:
        ValueError: An option breaks its rule.
    """

    model: Path | None = None
    context: int = 2048
    depth: float = 0.5
    top_k: int = 128
    weights: str | None = None
    num_bits: int | None = None
    query_bits: int | None = None
    seed: int = 0
    max_new_tokens: int = 32
    device: str | None = None
    dtype: str | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        """Checks every rule."""
        check(0.0 <= self.depth <= 1.0, WHERE, "--depth", "be in 0..1", self.depth)
        check(self.seed >= 0, WHERE, "--seed", "be at least 0", self.seed)
        check(
            self.max_new_tokens >= 2,
            WHERE,
            "--max-new-tokens",
            "be at least 2",
            self.max_new_tokens,
        )
        rule = f"be more than --max-new-tokens={self.max_new_tokens}"
        check(self.context > self.max_new_tokens, WHERE, "--context", rule, self.context)
        self.config()
        self.torch_dtype()
        if self.plot is not None:
            png = self.plot.suffix == ".png"
            check(png, WHERE, "--plot", "name a .png file", self.plot)

    def config(self) -> HataConfig:
        """Returns the budget: the defaults but for what is given."""
        # Sparse at any length: to show the method, also where a GPU would be faster densely.
        return HataConfig(top_k=self.top_k, min_sparse_len=0)

    def torch_device(self) -> torch.device:
        """Returns the device to run on."""
        return torch_device(self.device, WHERE)

    def torch_dtype(self) -> torch.dtype:
        """Returns the dtype to run in."""
        return torch_dtype(self.dtype, self.torch_device(), WHERE)
