"""``hata demo``."""

from pathlib import Path
from typing import Annotated

import typer

from hata.commands.extras import need


def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Local transformers folder; by default SmolLM2-135M-Instruct."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer together.")] = 2048,
    depth: Annotated[
        float, typer.Option(help="Where in the prose the fact stands, 0 (first) to 1 (last).")
    ] = 0.5,
    top_k: Annotated[int, typer.Option(help="Positions each KV head attends to.")] = 128,
    weights: Annotated[
        str | None,
        typer.Option(help="File of hash weights, or random; by default the package's own."),
    ] = None,
    num_bits: Annotated[
        int | None, typer.Option(help="Bits of a key's code; by default what the weights have.")
    ] = None,
    query_bits: Annotated[
        int | None, typer.Option(help="Bits of a query's projection, 1 to 4; 4 by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random hash weights and of the fact.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 32,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; by default float32, on a GPU bfloat16."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the attention mass per layer to this PNG file.")
    ] = None,
) -> None:
    """Generates an answer from a long prompt twice: with dense attention and with hata."""
    need("demo", "transformers", "matplotlib")
    from hata.demo.options import DemoOptions
    from hata.demo.run import run_demo

    run_demo(
        DemoOptions(
            model=model,
            context=context,
            depth=depth,
            top_k=top_k,
            weights=weights,
            num_bits=num_bits,
            query_bits=query_bits,
            seed=seed,
            max_new_tokens=max_new_tokens,
            device=device,
            dtype=dtype,
            plot=plot,
        )
    )
