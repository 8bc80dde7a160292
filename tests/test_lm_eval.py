"""lm-evaluation-harness with hata: tasks of local files, on a tiny model (`make test-lm-eval`)."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from families import FAMILIES
from hata.integrations.lm_eval import HataLM
from hata.integrations.transformers import CACHE_ARGUMENT, enabled
from tiny_folder import save_tiny_llama

TEXT = "the sixth sick sheik's sixth sheep's sick, " * 4
DOCS = [
    {"text": TEXT + f"and {i} is ", "choices": ["a", "b", f"more{i}"], "label": i % 3}
    for i in range(4)
]
TASKS: list[dict[str, Any]] = [
    {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    {
        "task": "tiny_answer",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"max_gen_toks": 6, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match"}],
    },
    {
        "task": "tiny_text",
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and the tasks' files; the tokenizer ends texts with its byte 0."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": "Ā", "pad_token": "Ā"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for task in TASKS:
        shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        shared |= {"test_split": "test", "doc_to_text": "{{text}}"}
        if task["output_type"] == "loglikelihood_rolling":
            shared["doc_to_text"] = ""
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(shared | task))
    return folder


def evaluate(folder: Path, model: str, cache: Path, monkeypatch, **args: Any) -> dict[str, Any]:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    found = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder), "dtype": "float32", "max_length": 300, **args},
        tasks=[task["task"] for task in TASKS],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert set(found["results"]) == {"tiny_choice", "tiny_answer", "tiny_text"}
    return found


def test_a_budget_of_everything_is_what_the_harness_finds_itself(folder, tmp_path, monkeypatch):
    dense = evaluate(folder, "hf", tmp_path, monkeypatch)
    sparse = evaluate(folder, "hata", tmp_path, monkeypatch, top_k=300)
    for task, samples in dense["samples"].items():
        for a, b in zip(samples, sparse["samples"][task], strict=True):
            for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
                assert x == pytest.approx(y, rel=1e-4) if task != "tiny_answer" else x == y
    few = evaluate(folder, "hata", tmp_path, monkeypatch, top_k=24, num_dense_layers=0)
    same = few["results"]["tiny_text"]["byte_perplexity,none"]
    assert same != pytest.approx(dense["results"]["tiny_text"]["byte_perplexity,none"], rel=1e-3)


@pytest.mark.parametrize("name", ["Llama", "Qwen3Next"])
@torch.no_grad()
def test_likelihoods_are_those_of_decoding_step_by_step(folder, name):
    """A context that two requests share, one of a single token, one that is cut to fit.

    Layers with a recurrent state cannot forget the first answer to a context.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if name != "Llama":
        model = next(family for family in FAMILIES if family.model == name).make()
    budget = {"top_k": 24, "num_dense_layers": 1, "num_sink": 2, "num_recent": 4}
    lm = HataLM(model, tokenizer=str(folder), **budget, max_length=120)
    encoded = [token % 97 for token in lm.tok_encode(TEXT)]  # of a small vocabulary
    pairs = [(encoded[:80], encoded[:40]), (encoded[:80], encoded[7:9]), ([3], encoded[:5])]
    pairs.append((encoded[:100], encoded[:50]))
    found = lm._loglikelihood_tokens([(None, *pair) for pair in pairs])
    for (context, continuation), (log_likelihood, greedy) in zip(pairs, found, strict=True):
        read = (context + continuation)[-121:][:-1]
        split = len(read) - len(continuation)
        steps = []
        with enabled(model, lm._budget, max_seq_len=120) as cache:
            cache.announce_prompt(split)
            if split:
                model(torch.tensor([read[:split]]), **{CACHE_ARGUMENT: cache})
            for token in read[split:]:
                logits = model(torch.tensor([[token]]), **{CACHE_ARGUMENT: cache}).logits
                steps.append(logits[0, 0].log_softmax(0))
        wanted = [float(x[t]) for x, t in zip(steps, continuation, strict=True)]
        assert log_likelihood == pytest.approx(sum(wanted), rel=1e-4)
        assert greedy == all(int(x.argmax()) == t for x, t in zip(steps, continuation, strict=True))


def test_what_is_not_hatas_goes_to_the_harness(folder):
    lm = HataLM(str(folder), top_k=40, dtype="float32", max_length=200, device="cpu")
    assert isinstance(lm, HFLM)
    assert (lm._budget.top_k, lm.max_length) == (40, 200)
    request = Instance("generate_until", {}, (TEXT, {"max_gen_toks": 3, "until": []}), 0)
    (text,) = lm.generate_until([request])
    assert len(text) <= 3
    with pytest.raises(ValueError, match=r"HataConfig: top_k must be .*, got 0"):
        HataLM(str(folder), top_k=0)
