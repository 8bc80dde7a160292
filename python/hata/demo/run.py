"""`hata demo` from options to printed results."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

from hata.demo.generate import Generation, generate
from hata.demo.mass import MassRecorder
from hata.demo.model import bundled_model, check_model_folder, load_model
from hata.demo.options import DemoOptions
from hata.demo.plot import plot_mass
from hata.demo.prompt import NEEDLE, Prompt, build_prompt
from hata.demo.report import Bytes, agreement, print_answers, print_mass
from hata.integrations.transformers import enable
from hata.weights import HashWeights


def run_demo(options: DemoOptions) -> dict[str, list[int]]:
    """Generates with dense attention and with hata, and prints the comparison.

    Args:
        options: What to run.

    Returns:
        The tokens of the answers, by "dense" and "hata".

    Raises:
        ValueError: An option does not fit the model.
    """
    console = Console(highlight=False)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.model is not None:
        check_model_folder(options.model, options.context)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("the model (its first conversion takes half a minute)", total=None)
        folder = options.model or bundled_model()
        check_model_folder(folder, options.context)
        model, tokenizer = load_model(folder, options.torch_device(), options.torch_dtype())
        prompt = build_prompt(
            tokenizer, options.context - options.max_new_tokens, options.depth, options.seed
        )
        _describe(console, options, folder.name, model, prompt)
        progress.remove_task(task)
        dense, hata, mass = _generate_both(progress, options, model, prompt)

    generations = {"dense": dense, "hata": hata}
    texts = {
        name: tokenizer.decode(run.token_ids, skip_special_tokens=True)
        for name, run in generations.items()
    }
    shape = _shape(model)
    last_step = len(prompt.token_ids) + len(hata.token_ids) - 1
    itemsize = options.torch_dtype().itemsize
    read = Bytes.of_step(options.config(), **shape, itemsize=itemsize, seq_len=last_step)
    print_answers(console, texts, prompt.number, generations, read)
    console.print(f"outputs agree: {agreement(dense.token_ids, hata.token_ids)}\n")
    print_mass(console, mass, shape["num_layers"])
    if options.plot is not None:
        title = f"{folder.name}, {len(prompt.token_ids)} tokens, top_k {options.top_k}"
        plot_mass(options.plot, mass, shape["num_layers"], title)
        console.print(f"plot: {options.plot}")
    return {name: run.token_ids for name, run in generations.items()}


def _generate_both(
    progress: Progress, options: DemoOptions, model: Any, prompt: Prompt
) -> tuple[Generation, Generation, dict[int, float]]:
    config = options.config()
    weights = HashWeights.random(**_shape(model), num_bits=options.num_bits, seed=options.seed)
    scales = (m.scaling for m in model.modules() if isinstance(getattr(m, "scaling", None), float))
    recorder = MassRecorder(next(scales, _shape(model)["head_dim"] ** -0.5))
    runs = []
    generate(model, prompt.token_ids[:16], 2, lambda: None)  # pages the weights in, off the clock
    for name in ("dense", "hata"):
        task = progress.add_task(f"{name}: prompt, then answer", total=options.max_new_tokens)
        cache = None
        if name == "dense":
            model.set_attn_implementation("sdpa")
        else:
            cache = enable(model, config, weights, max_seq_len=options.context, observer=recorder)
        runs.append(
            generate(
                model,
                prompt.token_ids,
                options.max_new_tokens,
                lambda task=task: progress.advance(task),  # type: ignore[misc]
                cache,
            )
        )
        progress.remove_task(task)
    assert cache is not None
    return runs[0], runs[1], recorder.mass_per_layer(cache.hata_cache)


def _shape(model: Any) -> dict[str, int]:
    config = model.config
    heads: int = config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
    }


def _describe(
    console: Console, options: DemoOptions, name: str, model: Any, prompt: Prompt
) -> None:
    shape = _shape(model)
    config = options.config()
    fact = NEEDLE.format(key=prompt.key, number=prompt.number).strip()
    heads = f"{model.config.num_attention_heads} query and {shape['num_kv_heads']} KV heads"
    dtype = str(options.torch_dtype()).removeprefix("torch.")
    lines = {
        "model": f"{name}: {shape['num_layers']} layers, {heads}, head_dim {shape['head_dim']}; "
        f"{dtype} on {options.torch_device()}",
        "prompt": f"{len(prompt.token_ids)} tokens: Python's documentation (pydoc_data.topics) "
        f'with "{fact}" at token {prompt.position}, and the question. '
        f'The answer begins "{prompt.answer_prefix}"',
        "hata": f"top_k {config.top_k} (the first {config.num_sink} and last {config.num_recent} "
        f"positions always), {config.num_bits}-bit keys, {config.query_bits}-bit queries; "
        f"the prompt and the first {config.num_dense_layers} layers are dense",
        "hash weights": f"random orthogonal, seed {options.seed}: untrained",
    }
    for label, text in lines.items():
        console.print(f"[bold]{label}:[/bold] {escape(text)}")
    console.print()
