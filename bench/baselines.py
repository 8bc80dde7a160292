"""What a step is compared with: dense decode attention.

Every dense baseline reads the K and V caches of a ``KvPool`` in place, each of its calls is exact,
and its output is checked against float32 attention before it is timed.
"""

import enum
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .buffers import KvPool
from .cases import Shape
from .checks import check_dense
from .timing import Timer, Timing

# Input set -> out, [batch, num_heads, head_dim] once it is reshaped: that could be a copy, which is
# nothing to time.
Attend = Callable[[int], Tensor]
# Name, shape and measurement -> what was measured; None if it fails, as it may.
Attempt = Callable[[str, object, Callable[[], Timing]], Timing | None]

MAX_CPU_PROMPT = 4 << 10
FLASHINFER_PAGE = 16
FLASHINFER_WORKSPACE = 128 << 20  # the size its documentation recommends

# The columns of the results, in order; a baseline that is not installed leaves its column empty.
DENSE = ("fa2_us", "cudnn_us", "flashinfer_us", "flashinfer_tc_us")
DENSE_MORE = ("flash_attn2_us", "flash_attn3_us", "sdpa_us")


class Baselines(enum.Enum):
    """Which of the dense kernels to measure."""

    ALL = "all"
    TORCH = "torch"  # PyTorch's own: nothing to compile
    NONE = "none"


def measure_dense(
    kv: KvPool,
    timer: Timer,
    baselines: Baselines,
    attempt: Attempt,
) -> dict[str, float]:
    """Times dense baselines on one shape, where every sequence is attended in full.

    Args:
        kv: The caches.
        timer: Times the calls.
        baselines: Which.
        attempt: Lets a baseline fail that does not support the shape, or cannot be compiled.

    Returns:
        Microseconds by column; of a baseline's forms (see ``sdpa_forms``) the fastest.
    """
    num_sets = min(kv.num_sets, timer.num_sets(kv.shape.kv_bytes))
    times: dict[str, float] = {}
    for column, name, make in dense_forms(kv, baselines):

        def measure(name: str = name, make: Callable[[], Attend] = make) -> Timing:
            attend = make()
            check_dense(kv, attend(0), name)
            return timer([functools.partial(attend, i) for i in range(num_sets)])

        timing = attempt(name, kv.shape, measure)
        if timing is not None:
            times[column] = min(timing.us, times.get(column, timing.us))
    return times


def dense_forms(
    kv: KvPool, baselines: Baselines
) -> Iterator[tuple[str, str, Callable[[], Attend]]]:
    """Yields column, name and constructor of every baseline that this machine has."""
    if baselines is Baselines.NONE:
        return
    if kv.k_caches.dtype != kv.qs.dtype:
        return  # dense attention over float8 caches multiplies float8 queries
    if kv.qs.device.type != "cuda":
        yield from sdpa_forms(kv, "sdpa_us", "SDPA", None)
        return
    yield from sdpa_forms(kv, "fa2_us", "SDPA flash", SDPBackend.FLASH_ATTENTION)
    yield from sdpa_forms(kv, "cudnn_us", "SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)
    if baselines is Baselines.TORCH:
        return
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


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    backend: SDPBackend | None,
    enable_gqa: bool,
    is_causal: bool = False,
) -> Tensor:
    attend = functools.partial(
        scaled_dot_product_attention, q, k, v, is_causal=is_causal, enable_gqa=enable_gqa
    )
    if backend is None:
        return attend()
    with sdpa_kernel(backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why a backend is unavailable; the error says that it is
        return attend()


def measure_prefill(
    shape: Shape, k: Tensor, v: Tensor, timer: Timer, attempt: Attempt
) -> float | None:
    """Times causal attention over whole prompts with the faster of PyTorch's kernels.

    Args:
        shape: The prompts, ``seq_len`` tokens each.
        k: ``[num_sets, batch, seq_len, num_kv_heads, head_dim]``.
        v: The same.
        timer: Times the calls.
        attempt: Lets a kernel fail that does not support the shape.

    Returns:
        Microseconds; None on a CPU, where a long prompt takes minutes.
    """
    cuda = timer.device.type == "cuda"
    if not cuda and shape.seq_len > MAX_CPU_PROMPT:
        return None
    heads = (shape.batch, shape.num_heads, shape.seq_len, shape.head_dim)
    q = k.new_empty(heads).normal_()
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION] if cuda else [None]

    def attend(i: int, backend: SDPBackend | None) -> Tensor:
        sets = (k[i].transpose(1, 2), v[i].transpose(1, 2))
        return sdpa(q, *sets, backend, enable_gqa=True, is_causal=True)

    timings = [
        attempt(
            f"causal SDPA, {backend}",
            shape,
            lambda backend=backend: timer(
                [functools.partial(attend, i, backend) for i in range(len(k))]
            ),
        )
        for backend in backends
    ]
    return min((timing.us for timing in timings if timing), default=None)


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
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
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
