"""What differs between versions of vLLM, and which of them are known to work."""

from typing import Any

import vllm
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from hata.checks import check

TESTED = ("0.26", "0.32")  # 0.26 on CUDA, 0.32 on a CPU


def check_version(any_version: bool) -> None:
    """Raises ValueError for a minor version that was not tested, unless it is forced."""
    tested = vllm.__version__.startswith(tuple(f"{minor}." for minor in TESTED))
    rule = f'be {" or ".join(TESTED)} (or set "any_version": true)'
    check(tested or any_version, "integrations.vllm", "vLLM's version", rule, vllm.__version__)


def register_backends() -> None:
    """Makes CUSTOM the hata backend.

    vLLM's CPU platform takes no other backend than CPU_ATTN, whatever is asked for, but looks up
    its class by name: `HataBackend` below, which is looked up once for each backend asked for.
    """
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.HataBackend")
    else:
        register_backend(AttentionBackendEnum.CUSTOM, "hata.integrations.vllm.cuda.HataBackend")


def __getattr__(name: str) -> Any:
    if name != "HataBackend":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from hata.integrations.vllm.cpu import HataBackend

    custom = get_current_vllm_config().attention_config.backend is AttentionBackendEnum.CUSTOM
    return HataBackend if custom else CPUAttentionBackend


class SideCacheBackend(AttentionBackend):
    """The layout of a side cache: a block is one run of bytes."""

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """The shape up to 0.32, which has a layout of its own for every cache."""
        return num_blocks, num_kv_heads, block_size, head_size
