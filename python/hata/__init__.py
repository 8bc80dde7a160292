"""Hash-aware top-k attention: long-context decoding that reads 8 bytes a token instead of 512.

Importing hata registers its operators as ``torch.ops.hata.*``; ``hata.ops`` documents them and
``hata.reference`` says what they compute.
"""

import torch  # noqa: F401  (loads libtorch, which _C needs)

from hata import _C  # noqa: F401  (registers torch.ops.hata)
from hata.attention import decode_attention, prefill
from hata.cache import HataCache
from hata.config import HataConfig
from hata.dense import attention_mass
from hata.ops import (
    DecodeStepOutput,
    FetchedRows,
    cache_append,
    cache_write,
    decode_step,
    dense_attention,
    encode_query,
    fetch_rows,
    gather_attention,
    hamming_score,
    hash_encode,
    merge_attention_states,
    num_planes,
    plane_weight_sum,
    score_select,
    select_topk,
    workspace_size,
)
from hata.pretrained import (
    pretrained_config,
    pretrained_frontier,
    pretrained_names,
    pretrained_weights,
)
from hata.weights import HashWeights, load_weights, save_weights

__all__ = [
    "DecodeStepOutput",
    "FetchedRows",
    "HashWeights",
    "HataCache",
    "HataConfig",
    "attention_mass",
    "cache_append",
    "cache_write",
    "decode_attention",
    "decode_step",
    "dense_attention",
    "encode_query",
    "fetch_rows",
    "gather_attention",
    "hamming_score",
    "hash_encode",
    "load_weights",
    "merge_attention_states",
    "num_planes",
    "plane_weight_sum",
    "prefill",
    "pretrained_config",
    "pretrained_frontier",
    "pretrained_names",
    "pretrained_weights",
    "save_weights",
    "score_select",
    "select_topk",
    "workspace_size",
]
