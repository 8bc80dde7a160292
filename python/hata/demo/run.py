"""`hata demo` from options to printed results."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers.utils import logging as transformers_logging

from hata.config import HataConfig
from hata.demo.generate import Generation, generate
from hata.demo.mass import MassRecorder
from hata.demo.model import bundled_model, check_model_folder, load_model
from hata.demo.options import WHERE, DemoOptions
from hata.demo.prompt import NEEDLE, Prompt, build_prompt
from hata.demo.report import Bytes, agreement, plot_mass, print_answers, print_mass
from hata.demo.weights import choose_weights
from hata.integrations.model_shape import (
    full_attention_layers,
    model_shape,
    softcap,
    softmax_scale,
)
from hata.integrations.transformers import enable
from hata.outputs import make_room_for
from hata.progress import progress_bar
from hata.weights import HashWeights


@dataclass(frozen=True)
class DemoResult:
    """What the demo found out.

    Attributes:
        number: The right answer.
        texts: The answers, by "dense" and "hata".
        generations: Their tokens and times, likewise.
        read: Bytes of cache that the last decoding step read.
        mass: Selected share of the dense attention mass by layer, sparse layers only.
    """

    number: str
    texts: Mapping[str, str]
    generations: Mapping[str, Generation]
    read: Bytes
    mass: Mapping[int, float]


def run_demo(options: DemoOptions) -> DemoResult:
    """Generates with dense attention and with hata, and prints the comparison.

    Args:
        options: What to run.

    Returns:
        What was printed.

    Raises:
        ValueError: An option does not fit the model.
    """
    if options.plot is not None:
        make_room_for(options.plot, WHERE, "--plot")
    console = Console(highlight=False)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with progress_bar("the model (its first conversion takes half a minute)", None):
        folder = options.model or bundled_model()
        check_model_folder(folder, options.context)
        model, tokenizer = load_model(folder, options.torch_device(), options.torch_dtype())
    weights = choose_weights(options, folder.name, model_shape(model), full_attention_layers(model))
    config = options.config()
    prompt_len = options.context - options.max_new_tokens
    prompt = build_prompt(tokenizer, prompt_len, options.depth, options.seed)
    _describe(console, options, folder.name, model, prompt, weights, config)
    dense, hata, mass = _generate_both(options, model, prompt, weights, config)

    generations = {"dense": dense, "hata": hata}
    texts = {
        name: tokenizer.decode(run.token_ids, skip_special_tokens=True)
        for name, run in generations.items()
    }
    shape = model_shape(model)
    last_step = len(prompt.token_ids) + len(hata.token_ids) - 1
    itemsize = options.torch_dtype().itemsize
    read = Bytes.of_step(config, weights, itemsize=itemsize, seq_len=last_step)
    print_answers(console, texts, prompt.number, generations, read)
    console.print(f"outputs agree: {agreement(dense.token_ids, hata.token_ids)}\n")
    print_mass(console, mass, shape["num_layers"])
    if options.plot is not None:
        title = f"{folder.name}, {len(prompt.token_ids)} tokens, top_k {options.top_k}"
        plot_mass(options.plot, mass, shape["num_layers"], title)
        console.print(f"plot: {options.plot}")
    return DemoResult(prompt.number, texts, generations, read, mass)


def _generate_both(
    options: DemoOptions,
    model: Any,
    prompt: Prompt,
    weights: HashWeights,
    config: HataConfig,
) -> tuple[Generation, Generation, dict[int, float]]:
    # As the model was loaded, but for logits that "sdpa" would not cap.
    own = "eager" if softcap(model) is not None else model.config._attn_implementation
    recorder = MassRecorder(softmax_scale(model), softcap(model))
    cache = enable(
        model,
        config,
        weights=weights,
        max_seq_len=options.context,
        offload=options.offload,
        observer=recorder,
    )

    def run(attention: str, name: str, cache: Any) -> Generation:
        model.set_attn_implementation(attention)
        most = options.max_new_tokens
        with progress_bar(f"{name}: prompt, then answer", most) as on_token:
            return generate(model, prompt.token_ids, most, on_token, cache)

    model.set_attn_implementation(own)
    generate(model, prompt.token_ids[:16], 2, lambda: None)  # pages the weights in, off the clock
    dense = run(own, "dense", None)
    hata = run("hata", "hata", cache)
    assert cache.hata_cache is not None  # made by the forward passes of generate
    mass = recorder.mass_per_layer(cache.hata_cache)
    return dense, hata, {cache.hata_layers[i]: share for i, share in mass.items()}


def _describe(
    console: Console,
    options: DemoOptions,
    name: str,
    model: Any,
    prompt: Prompt,
    weights: HashWeights,
    config: HataConfig,
) -> None:
    shape = model_shape(model)
    recipe, origin = weights.metadata.get("recipe"), weights.metadata.get("origin", "unknown")
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
        f"positions always), {weights.num_bits}-bit keys, {weights.query_bits}-bit queries; "
        f"the prompt and the first {config.num_dense_layers} layers are dense"
        + ("" if options.offload is None else "; the other layers' keys and values in host memory"),
        "hash weights": f"{origin}: {'trained' if recipe not in (None, 'random') else 'untrained'}",
    }
    for label, text in lines.items():
        console.print(f"[bold]{label}:[/bold] {escape(text)}")
    console.print()
