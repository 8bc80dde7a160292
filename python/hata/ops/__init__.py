"""The operators of torch.ops.hata, in the order in which one decoding step calls them.

Each module holds an operator's wrapper, whose docstring is the operator's contract, and below it
the fake kernel, which gives torch.compile the outputs' shapes and dtypes. Arguments have one order
everywhere, ``torch.ops.hata`` and ``hata.reference`` included: new data, weights, caches, tables,
settings; wrappers and reference take settings by keyword.

Every operator names its caches alike (docs/layout.md):

* ``k_cache``, ``v_cache`` ``[num_pages, page_size, num_kv_heads, head_dim]``: any strides, last
  dimension contiguous.
* ``code_cache`` ``[num_pages, num_kv_heads, page_size, num_words]``, int32: last two dimensions
  contiguous. ``norm_cache`` ``[num_pages, num_kv_heads, page_size]``, float16: last one contiguous;
  None where scores do not count norms.
* ``block_table`` ``[batch, max_pages]``, int32: position ``t`` of sequence ``b`` is row
  ``t % page_size`` of page ``block_table[b, t // page_size]``. ``page_size`` is a power of two, or
  anything when ``max_pages`` is 1 (a contiguous cache).
* ``cache_seqlens`` ``[batch]``, int32: positions in use, the ``q_len`` tokens of this call
  included. Query token ``j`` sees the positions below ``cache_seqlens[b] - q_len + j + 1``.

Both lie on the device. On CPU a length or page out of range raises; on CUDA, where looking would
stall the device, nothing out of range is read or written.

Inference only: a wrapper refuses tensors that require a gradient while autograd is on, and
``torch.ops.hata`` builds no graph.
"""

from hata.ops.cache_append import cache_append
from hata.ops.cache_write import cache_write
from hata.ops.decode_step import DecodeStepOutput, decode_step
from hata.ops.dense_attention import dense_attention
from hata.ops.encode_query import encode_query, num_planes, plane_weight_sum
from hata.ops.fetch_rows import FetchedRows, fetch_rows
from hata.ops.gather_attention import gather_attention
from hata.ops.hamming_score import hamming_score
from hata.ops.hash_encode import hash_encode
from hata.ops.merge_attention_states import merge_attention_states
from hata.ops.score_select import score_select
from hata.ops.select_topk import select_topk
from hata.ops.workspace_size import workspace_size

__all__ = [
    "DecodeStepOutput",
    "FetchedRows",
    "cache_append",
    "cache_write",
    "decode_step",
    "dense_attention",
    "encode_query",
    "fetch_rows",
    "gather_attention",
    "hamming_score",
    "hash_encode",
    "merge_attention_states",
    "num_planes",
    "plane_weight_sum",
    "score_select",
    "select_topk",
    "workspace_size",
]
