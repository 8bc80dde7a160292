"""What `hata demo` is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from typer import Option

from hata.checks import check
from hata.config import HataConfig
from hata.device import ModelOptions, torch_device, torch_dtype
from hata.weights import check_format

WHERE = "demo"


@dataclass(frozen=True, kw_only=True)
class DemoOptions(ModelOptions):
    """The options of `hata demo`, checked as far as no model is needed for it.

    Raises:
        ValueError: An option breaks its rule.
    """

    context: Annotated[int, Option(help="Tokens of prompt and answer together.")] = 2048
    depth: Annotated[
        float, Option(help="Where in the prose the fact stands, 0 (first) to 1 (last).")
    ] = 0.5
    top_k: Annotated[int, Option(help="Positions each KV head attends to.")] = 128
    weights: Annotated[
        str | None, Option(help="File of hash weights, or random; by default the package's own.")
    ] = None
    num_bits: Annotated[
        int | None, Option(help="Bits of a key's code; by default what the weights have.")
    ] = None
    query_bits: Annotated[
        int | None, Option(help="Bits of a query's projection, 1 to 4; by default as trained.")
    ] = None
    offload: Annotated[
        str | None, Option(help="Keep keys and values in host memory, at most so much: 64GB.")
    ] = None
    seed: Annotated[int, Option(help="Seed of random hash weights and of the fact.")] = 0
    max_new_tokens: Annotated[int, Option(help="The longest answer, in tokens.")] = 32
    plot: Annotated[
        Path | None, Option(help="Write the attention mass per layer to this PNG file.")
    ] = None

    def __post_init__(self) -> None:
        """Checks every rule."""
        check(0.0 <= self.depth <= 1.0, WHERE, "--depth", "be in 0..1", self.depth)
        check(self.seed >= 0, WHERE, "--seed", "be at least 0", self.seed)
        longest = self.max_new_tokens
        check(longest >= 2, WHERE, "--max-new-tokens", "be at least 2", longest)
        rule = f"be more than --max-new-tokens={longest}"
        check(self.context > longest, WHERE, "--context", rule, self.context)
        self.config()
        num_bits = 32 if self.num_bits is None else self.num_bits
        query_bits = 1 if self.query_bits is None else self.query_bits
        check_format(WHERE, num_bits, query_bits, key_norms=False)
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
