"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:.*random orthogonal weights.*:UserWarning")
def test_the_examples_run():
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        eos_token_id=None,
    )
    names = {
        "model": LlamaForCausalLM(config).eval(),
        "inputs": {"input_ids": torch.randint(97, (1, 600))},
    }
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(example, names)
    assert names["out"].shape == (1, 1, 8, 64)
    assert names["answer"].shape == (1, 700)
