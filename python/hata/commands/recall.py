"""``hata recall``."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from hata.commands.extras import need
from hata.config import HataConfig
from hata.device import torch_device

_DEFAULT = HataConfig()


def recall(
    captures: Annotated[
        Path, typer.Argument(help="Captures of held-out text (hata capture --values).")
    ],
    weights: Annotated[
        list[Path] | None, typer.Option(help="Hash weights to measure; repeat it for more.")
    ] = None,
    query_bits: Annotated[
        int | None, typer.Option(help="Bits of a query's projection, if not as trained.")
    ] = None,
    key_norms: Annotated[
        bool | None,
        typer.Option("--key-norms/--no-key-norms", help="Whether to use norms, if not as trained."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Measure random codes, Loki, Quest and SparQ too.")
    ] = True,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Captures of training text: to fit Loki and to choose the frontier on."),
    ] = None,
    random_bits: Annotated[
        list[int] | None, typer.Option(help="Bits of random codes, by default 128; repeatable.")
    ] = None,
    channels: Annotated[
        list[int] | None,
        typer.Option(help="Channels of Loki and SparQ, by default head_dim / 4 and / 2."),
    ] = None,
    page_size: Annotated[int, typer.Option(help="Keys of one of Quest's pages.")] = 16,
    top_k: Annotated[
        list[int] | None, typer.Option(help="Budgets, by default 0.4 to 12.5 % of the context.")
    ] = None,
    num_sink: Annotated[
        int, typer.Option(help="First positions that all take, inside the budget.")
    ] = _DEFAULT.num_sink,
    num_recent: Annotated[
        int, typer.Option(help="Last positions that all take, inside the budget.")
    ] = _DEFAULT.num_recent,
    num_dense_layers: Annotated[
        int, typer.Option(help="Leading layers that the means leave out.")
    ] = _DEFAULT.num_dense_layers,
    num_queries: Annotated[
        int | None, typer.Option(help="Queries of each sequence; by default all captured ones.")
    ] = None,
    frontier: Annotated[
        Path | None,
        typer.Option(
            help="Find the best num_bits and top_k for the bytes read, overall and per layer, "
            "among weights that differ in num_bits alone; write them to this JSON file."
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the means to this CSV file.")] = None,
    per_head: Annotated[
        Path | None, typer.Option(help="Write every layer and KV head to this CSV file.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write PNG files into this folder.")] = None,
    memory_limit_gb: Annotated[
        float, typer.Option(help="GB for the queries that are measured at once.")
    ] = 0.25,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")
    ] = None,
) -> None:
    """Measures how much of the attention hash weights and other selectors find."""
    if plot is not None:
        need("recall", "matplotlib")
    from hata.recall.options import RecallOptions
    from hata.recall.run import run_recall

    run_recall(
        RecallOptions(
            captures=captures,
            device=torch_device(device, "recall"),
            weights=tuple(weights or ()),
            query_bits=query_bits,
            key_norms=key_norms,
            baselines=baselines,
            calibration=calibration,
            random_bits=tuple(random_bits or (128,)),
            channels=tuple(channels or ()),
            page_size=page_size,
            top_k=tuple(top_k or ()),
            num_sink=num_sink,
            num_recent=num_recent,
            num_dense_layers=num_dense_layers,
            num_queries=num_queries,
            frontier=frontier,
            csv=csv,
            per_head=per_head,
            plot=plot,
            memory_limit_gb=memory_limit_gb,
            command=shlex.join(["hata", *sys.argv[1:]]),
        )
    )
