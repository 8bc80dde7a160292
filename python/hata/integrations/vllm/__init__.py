"""hata in vLLM: ``vllm serve MODEL --attention-backend CUSTOM --additional-config ...``.

vLLM finds `register` by its entry point ``vllm.general_plugins``, in the engine and in every
worker. Who does not ask for the backend CUSTOM gets vLLM as it is. docs/vllm.md says what is
supported and how it was tested.
"""

import json
import os
from collections.abc import Sequence
from typing import Any


def register() -> None:
    """Registers the attention backend with vLLM; the entry point."""
    from hata.integrations.vllm import versions

    versions.register_backends()


def engine_args(
    weights: str | os.PathLike[str],
    top_k: int | float | Sequence[int | float],
    **settings: Any,
) -> dict[str, Any]:
    """Returns the arguments that switch a vLLM engine to hata attention.

    ``LLM(model, **engine_args("weights.safetensors", top_k=2048))``

    Args:
        weights: The file of the model's hash weights, or "random" for untrained ones.
        top_k: Positions that each KV head attends to, or a share of the context, of all layers or
            of each.
        settings: The other fields of `Settings`: ``num_sink``, ``num_recent``,
            ``num_dense_layers``, ``check``, ``observer``, ``measure_every``, ``any_version``.

    Returns:
        ``attention_backend`` and ``additional_config``, for ``vllm.LLM`` and ``EngineArgs``.

    Raises:
        TypeError: A setting has another type.
        ValueError: A setting breaks its rule or is unknown, or there is no such file.
    """
    from hata.integrations.vllm.settings import Settings

    entry = {"weights": os.fspath(weights), "top_k": top_k, **settings}
    Settings.parse(entry)
    return {
        "attention_backend": "CUSTOM",
        "additional_config": {"hata": json.loads(json.dumps(entry))},
    }
