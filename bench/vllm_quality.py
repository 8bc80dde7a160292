"""What a model says in vLLM's engine with hata, against what it says with vLLM's own attention.

The prompts are prose with a planted number, in the middle of the first, second, ... of equal parts,
and each ends with the beginning of the answer. Every engine has a process of its own and continues
them greedily, past the model's end token. Then hata decodes stock vLLM's continuation token by
token, as if it had chosen it: the difference of the two log-likelihoods is that of decoding alone.
The first token of each comes of its prompt, which is dense in both, and is left out.
"""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
from rich.console import Console
from typer import Option

from hata.checks import check, check_int
from hata.commands.options import with_options
from hata.demo.model import bundled_model, check_model_folder
from hata.demo.prompt import Prompt, build_prompt
from hata.device import ModelFolder
from hata.pretrained import pretrained_weights
from hata.provenance import origin
from hata.weights import save_weights

from .options import Output, check_output, repeated
from .report import RESULTS, Report, Row, slug
from .vllm import in_a_process, start

CONTEXTS = (2048, 4096)
TOP_KS = (64, 256, 8192)  # the last selects everything: what rounding alone does
COLUMNS = ["vllm", "model", "context", "top_k", "backend", "dense_layers", "prompts", "tokens"]
COLUMNS += ["tokens_equal", "first_difference", "found", "found_stock", "logprob_difference"]
COLUMNS += ["stderr"]
SHOWN = {name: name.replace("_", " ") for name in COLUMNS}


@dataclass(frozen=True, kw_only=True)
class Options(Output):
    """What the command line chose."""

    model: ModelFolder = None
    weights: Annotated[
        Path | None, Option(help="The model's hash weights; by default the package's.")
    ] = None
    context: Annotated[
        list[int], Option(help=f"Tokens of a prompt; may be repeated. By default {CONTEXTS}.")
    ] = field(default_factory=list)
    top_k: Annotated[
        list[int], Option(help=f"Positions to select; may be repeated. By default {TOP_KS}.")
    ] = field(default_factory=list)
    prompts: Annotated[int, Option(help="Of each context.")] = 8
    tokens: Annotated[int, Option(help="To generate after each prompt.")] = 64
    dense_layers: Annotated[int, Option(help="First layers that stay dense.")] = 2

    def words(self) -> list[str]:
        """Returns the options that decide what a row holds, as they are typed."""
        return [
            *(["--model", self.model.name] if self.model else []),
            *(["--weights", self.weights.name] if self.weights else []),
            *repeated("--context", [str(context) for context in self.context]),
            *repeated("--top-k", [str(top_k) for top_k in self.top_k]),
            f"--prompts {self.prompts} --tokens {self.tokens} --dense-layers {self.dense_layers}",
        ]


class Answer(NamedTuple):
    """A continuation of one prompt."""

    text: str
    token_ids: list[int]
    logprobs: list[float]  # of each token, given those before it


@dataclass(frozen=True)
class Answers:
    """What one engine said: for each context, the answer to each prompt."""

    version: str
    free: list[list[Answer]]
    forced: list[list[Answer]]  # stock vLLM's tokens; empty for stock vLLM itself


@with_options()
def measure_quality(options: Options) -> None:
    """Compares what a model says in vLLM's engine, with hata and without."""
    from transformers import AutoTokenizer

    contexts, top_ks = options.context or CONTEXTS, options.top_k or TOP_KS
    check_int("bench", "--prompts", options.prompts, 1)
    check_int("bench", "--tokens", options.tokens, 2)
    model = options.model or bundled_model()
    check_model_folder(model, max(contexts) + options.tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = options.output or RESULTS / f"vllm_quality_{slug(device)}.csv"
    check_output(path)
    command = " ".join(["python -m bench vllm-quality", *options.words()])
    report = Report(path, COLUMNS, origin(device, command), options.append)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    count = options.prompts
    prompts = [
        [build_prompt(tokenizer, context, (i + 0.5) / count, seed=i) for i in range(count)]
        for context in contexts
    ]
    asked = (str(model), prompts, options.tokens)
    with TemporaryDirectory() as folder:
        weights = options.weights or Path(folder) / "hash.safetensors"
        if not options.weights:
            save_weights(weights, pretrained_weights(model.name))
        stock = in_a_process(answers, *asked, {"attention_backend": "FLASH_ATTN"}, None)
        for top_k in top_ks:
            budget = {"top_k": top_k, "num_dense_layers": options.dense_layers}
            hata = in_a_process(answers, *asked, {"weights": str(weights), **budget}, stock.free)
            for i, context in enumerate(contexts):
                row = {"vllm": hata.version, "model": model.name, "backend": "hata"}
                row |= {"context": context, "top_k": top_k, "dense_layers": options.dense_layers}
                row |= {"prompts": count, "tokens": options.tokens}
                report.add(row | compare(prompts[i], stock.free[i], hata.free[i], hata.forced[i]))
    report.show(Console(), SHOWN, "Answers in vLLM", "logprobs of stock vLLM's own tokens")
    print(f"{len(report.rows)} rows in {path}")


def answers(
    model: str,
    prompts: list[list[Prompt]],
    num_tokens: int,
    settings: dict[str, Any],
    texts: list[list[Answer]] | None,
) -> Answers:
    """Asks one engine, in this process.

    vLLM runs its model runner V1 where an engine has logits processors.

    Args:
        model: The model's folder.
        prompts: Those of each context.
        num_tokens: Of each answer.
        settings: vLLM's, or hata's where they name its weights.
        texts: Answers to say again, in another pass; None: none.
    """
    import vllm
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    from hata.integrations.vllm import engine_args

    class Forced(AdapterLogitsProcessor):  # type: ignore[misc]
        """Leaves only the token that a request asks for; logprobs are taken before."""

        def is_argmax_invariant(self) -> bool:
            return False

        def new_req_logits_processor(self, params: Any) -> Any:
            token_ids = (params.extra_args or {}).get("token_ids")

            def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
                only = torch.full_like(logits, -torch.inf)
                only[token_ids[len(output_ids)]] = 0.0
                return only

            return force if token_ids else None

    longest = max(len(prompt.token_ids) for asked in prompts for prompt in asked)
    llm = start(
        model,
        longest + num_tokens,
        [len(prompts[0])],
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        logits_processors=[Forced],
        async_scheduling=False,  # a logits processor counts the tokens so far
        **(engine_args(**settings) if "weights" in settings else settings),
    )

    def ask(asked: list[Prompt], said: list[Answer] | None) -> list[Answer]:
        inputs = [vllm.TokensPrompt(prompt_token_ids=prompt.token_ids) for prompt in asked]
        params = [
            vllm.SamplingParams(
                max_tokens=num_tokens,
                temperature=0.0,
                ignore_eos=True,
                logprobs=0,
                extra_args={"token_ids": answer.token_ids} if answer else None,
            )
            for answer in said or [None] * len(asked)
        ]
        found = []
        for result in llm.generate(inputs, params, use_tqdm=False):
            output = result.outputs[0]
            steps = zip(output.token_ids, output.logprobs, strict=True)
            logprobs = [step[token].logprob for token, step in steps]
            found.append(Answer(output.text, list(output.token_ids), logprobs))
        return found

    free = [ask(asked, None) for asked in prompts]
    forced = [ask(*pair) for pair in zip(prompts, texts, strict=True)] if texts else []
    return Answers(vllm.__version__, free, forced)


def compare(
    prompts: list[Prompt], stock: list[Answer], hata: list[Answer], forced: list[Answer]
) -> Row:
    """Returns the columns that compare the answers to the prompts of one context.

    ``tokens_equal`` is the share of tokens that are the same in the same place,
    ``first_difference`` the mean share of those before the first that is not. ``found`` counts
    numbers that both engines find.
    """
    equal, first, differences = [], [], []
    for a, b, c in zip(stock, hata, forced, strict=True):
        check(c.token_ids == a.token_ids, "bench", "a forced text", "be the given one", c.text)
        same = [x == y for x, y in zip(a.token_ids, b.token_ids, strict=True)][1:]
        equal.append(mean(same))
        first.append([*same, False].index(False) / len(same))
        steps = zip(c.logprobs[1:], a.logprobs[1:], strict=True)
        differences.append(mean(x - y for x, y in steps))
    found_stock = [prompt.number in a.text for prompt, a in zip(prompts, stock, strict=True)]
    found = [prompt.number in b.text for prompt, b in zip(prompts, hata, strict=True)]
    count = len(differences)
    return {
        "tokens_equal": mean(equal),
        "first_difference": mean(first),
        "found": sum(a and b for a, b in zip(found_stock, found, strict=True)),
        "found_stock": sum(found_stock),
        "logprob_difference": mean(differences),
        "stderr": stdev(differences) / count**0.5 if count > 1 else None,
    }
