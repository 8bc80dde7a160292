"""What hata is compared with: dense decode attention, and generic top-k and gather pipelines.

Every dense baseline reads the K and V caches of a ``KvPool`` in place, each of its calls is exact,
and its output is checked against float32 attention before it is timed.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .buffers import KvPool, cyclic
from .checks import check_dense
from .run import first_line
from .timing import Timer

# Input set -> out, [batch, num_heads, head_dim] once it is reshaped: that could be a copy, which is
# nothing to time.
Attend = Callable[[int], Tensor]

FLASHINFER_PAGE = 16
FLASHINFER_WORKSPACE = 128 << 20  # the size its documentation recommends

# The columns of the results, in order; a baseline that is not installed leaves its column empty.
DENSE = ("fa2_us", "cudnn_us", "flashinfer_us", "flashinfer_tc_us")
DENSE_MORE = ("flash_attn2_us", "flash_attn3_us", "sdpa_us")


def measure_dense(kv: KvPool, timer: Timer, note: Callable[[str], None]) -> dict[str, float]:
    """Times every dense baseline of the device on one shape.

    Args:
        kv: The caches; every sequence is attended in full.
        timer: Times the calls.
        note: Told, in one line, of each baseline that could not run.

    Returns:
        Microseconds by column; of a baseline's forms (see ``sdpa_forms``) the fastest.
    """
    num_sets = min(kv.num_sets, timer.num_sets(kv.shape.kv_bytes(kv.dtype)))
    times: dict[str, float] = {}
    for column, name, make in dense_forms(kv):
        try:
            attend = make()
            check_dense(kv, attend(0), name)
            timing = timer([functools.partial(attend, i) for i in range(num_sets)])
        except Exception as error:  # a library that does not support the shape, or fails to build
            note(f"{kv.shape}: no {name}: {first_line(error)}")
            continue
        times[column] = min(timing.us, times.get(column, timing.us))
    return times


def dense_forms(kv: KvPool) -> Iterator[tuple[str, str, Callable[[], Attend]]]:
    """Yields column, name and constructor of every baseline that this machine has."""
    if kv.qs.device.type != "cuda":
        yield from sdpa_forms(kv, "sdpa_us", "SDPA", None)
        return
    yield from sdpa_forms(kv, "fa2_us", "SDPA flash", SDPBackend.FLASH_ATTENTION)
    yield from sdpa_forms(kv, "cudnn_us", "SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)
    if importlib.util.find_spec("flashinfer"):
        yield "flashinfer_us", "FlashInfer", lambda: flashinfer_decode(kv, tensor_cores=False)
        yield "flashinfer_tc_us", "FlashInfer tc", lambda: flashinfer_decode(kv, tensor_cores=True)
    if importlib.util.find_spec("flash_attn"):
        yield "flash_attn2_us", "flash-attn 2", lambda: flash_attn_decode(kv, "flash_attn")
    if importlib.util.find_spec("flash_attn_interface"):
        yield (
            "flash_attn3_us",
            "flash-attn 3",
            lambda: flash_attn_decode(kv, "flash_attn_interface"),
        )


def sdpa_forms(
    kv: KvPool, column: str, name: str, backend: SDPBackend | None
) -> Iterator[tuple[str, str, Callable[[], Attend]]]:
    """Yields the two ways to call SDPA for one new token with grouped heads.

    "folded" makes the group's heads the query tokens of their KV head, which needs no mask because
    the one new token sees everything; "gqa" leaves the grouping to SDPA.
    """
    yield column, f"{name}, folded", lambda: sdpa_decode(kv, backend, folded=True)
    if kv.shape.group > 1:
        yield column, f"{name}, gqa", lambda: sdpa_decode(kv, backend, folded=False)


def sdpa_decode(kv: KvPool, backend: SDPBackend | None, folded: bool) -> Attend:
    shape = kv.shape

    def attend(i: int) -> Tensor:
        k, v = kv.k_caches[i].transpose(1, 2), kv.v_caches[i].transpose(1, 2)
        if folded:  # [batch, num_kv_heads, group, head_dim]
            q = kv.qs[i].view(shape.batch, shape.num_kv_heads, shape.group, shape.head_dim)
        else:  # [batch, num_heads, 1, head_dim]
            q = kv.qs[i].transpose(1, 2)
        return sdpa(q, k, v, backend, enable_gqa=not folded)

    return attend


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None, enable_gqa: bool) -> Tensor:
    if backend is None:
        return scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)
    with sdpa_kernel(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why a backend is unavailable; the error says that it is
        return scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)


def flashinfer_decode(kv: KvPool, tensor_cores: bool) -> Attend:
    import flashinfer

    shape, device = kv.shape, kv.qs.device
    pages_per_seq = shape.seq_len // FLASHINFER_PAGE
    num_pages = shape.batch * pages_per_seq
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device),
        "NHD",
        use_tensor_cores=tensor_cores,
    )
    wrapper.plan(
        torch.arange(shape.batch + 1, dtype=torch.int32) * pages_per_seq,
        torch.arange(num_pages, dtype=torch.int32, device=device),
        torch.full((shape.batch,), FLASHINFER_PAGE, dtype=torch.int32),
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        FLASHINFER_PAGE,
        q_data_type=kv.dtype,
        kv_data_type=kv.dtype,
    )
    pages = (num_pages, FLASHINFER_PAGE, shape.num_kv_heads, shape.head_dim)
    out = torch.empty_like(kv.qs[0, :, 0])

    def attend(i: int) -> Tensor:
        caches = (kv.k_caches[i].view(pages), kv.v_caches[i].view(pages))
        return wrapper.run(kv.qs[i, :, 0], caches, out=out)

    return attend


def flash_attn_decode(kv: KvPool, module: str) -> Attend:
    """flash-attn 2 (module flash_attn) or 3 (module flash_attn_interface)."""
    decode = importlib.import_module(module).flash_attn_with_kvcache
    lengths = kv.cache_seqlens

    def attend(i: int) -> Tensor:
        return decode(kv.qs[i], kv.k_caches[i], kv.v_caches[i], cache_seqlens=lengths)

    return attend


def gather_then_sdpa(kv: KvPool, indices: Tensor) -> Attend:
    """Attention over selected rows with PyTorch alone: copies the rows, then SDPA over the copy.

    Args:
        kv: The contiguous caches.
        indices: ``[num_sets, batch, 1, num_kv_heads, top_k]``, all of them positions.
    """
    shape = kv.shape
    rows = indices[:, :, 0].long()  # [num_sets, batch, num_kv_heads, top_k]
    sequences = torch.arange(shape.batch, device=rows.device)[:, None, None]
    heads = torch.arange(shape.num_kv_heads, device=rows.device)[:, None]

    def attend(i: int) -> Tensor:
        k = cyclic(kv.k_caches, i)[
            sequences, rows[i], heads
        ]  # [batch, num_kv_heads, top_k, head_dim]
        v = cyclic(kv.v_caches, i)[sequences, rows[i], heads]
        q = cyclic(kv.qs, i).view(shape.batch, shape.num_kv_heads, shape.group, shape.head_dim)
        return sdpa(q, k, v, None, enable_gqa=False)

    return attend
