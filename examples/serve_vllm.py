"""SmolLM2 served over HTTP by vLLM with hata, and what was selected while it answered.

python examples/serve_vllm.py     # in the environment of make test-vllm, or with vLLM on a GPU
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from openai import APIConnectionError, OpenAI
from torch import Tensor

import hata
from hata.demo.model import bundled_model
from hata.integrations.vllm import engine_args

HERE = Path(__file__).resolve()
PORT, TOP_K, LAYER = 8765, 128, 15


def show(layer_idx: int, indices: Tensor, num_selected: Tensor, cache_seqlens: Tensor) -> None:
    """The observer, in the server: what the first KV head of one layer selects."""
    if layer_idx == LAYER:
        seq_len, chosen = int(cache_seqlens[0]), indices[0, 0, 0, : num_selected[0, 0, 0]].tolist()
        print(f"{len(chosen)} of {seq_len} positions: {chosen[:8]} ... {chosen[-4:]}", flush=True)


def main() -> None:
    model, text = bundled_model(), (HERE.parents[1] / "LICENSE").read_text()
    weights = Path(hata.__file__).parent / "pretrained" / "SmolLM2-135M-Instruct.safetensors"
    settings = engine_args(weights, top_k=TOP_K, observer=f"{HERE.stem}:show")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "smollm2", "--port", str(PORT), "--max-model-len", "2048"]
    command += ["--enforce-eager", "--attention-backend", settings["attention_backend"]]
    command += ["--additional-config", json.dumps(settings["additional_config"])]
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, env=environment)
    try:
        client = OpenAI(base_url=f"http://localhost:{PORT}/v1", api_key="none")
        while True:
            try:
                client.models.list()
                break
            except APIConnectionError:
                if server.poll() is not None:
                    sys.exit("error: the server has stopped, see above")
                time.sleep(1)
        question = f"{text[:5000]}\n\nIn one sentence: what is this text?"
        answer = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": question}],
            max_tokens=24,
            temperature=0.0,
        )
        print(answer.choices[0].message.content)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
