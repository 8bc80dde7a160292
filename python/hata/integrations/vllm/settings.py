"""The settings of one engine, from its ``additional_config``."""

import os
from dataclasses import dataclass, field, fields
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig

from hata.checks import check, check_int, check_type
from hata.config import HataConfig
from hata.integrations.vllm.versions import check_version
from hata.weights import HashWeights, load_weights

HERE = "integrations.vllm"
RANDOM = "random"
FULL, SLIDING = "full_attention", "sliding_attention"  # a config's layer_types

_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32", "fp8", "fp8_e4m3")


@dataclass(frozen=True)
class Settings:
    """What ``additional_config={"hata": {...}}`` says.

    Sequences of at most ``top_k`` positions select all of them, which is dense attention; there is
    no ``min_sparse_len``, since a captured CUDA graph decodes every sequence alike, and every
    sparse layer selects (no ``share_selection``).

    Attributes:
        weights: The file of the model's hash weights, or "random" for untrained ones.
        config: The budget: ``top_k``, ``min_top_k``, ``num_sink``, ``num_recent``,
            ``num_dense_layers``.
        check: Whether to encode the cached keys again after every step and to stop at the first
            code that differs; slow, and on a GPU only with ``enforce_eager``. Of float8 keys the
            bits that rounding can have changed are not compared.
        observer: "module:function", called in every worker after each sparse step of a layer as
            ``observer(layer_idx, indices, num_selected, cache_seqlens)``: the selection of a run of
            sequences as `hata.decode_step` returns it, of this rank's KV heads, and their lengths.
            A step that is replayed from a CUDA graph calls nothing.
        measure_every: Every so many decoding steps, the share of dense attention that the selection
            holds is measured and becomes a metric of Prometheus, ``hata:attention_mass``; 0:
            never. Not in steps that are replayed from a CUDA graph.
        any_version: Whether to run with a version of vLLM that was not tested.
    """

    weights: str
    config: HataConfig = field(default_factory=HataConfig)
    check: bool = False
    observer: str | None = None
    measure_every: int = 0
    any_version: bool = False

    @classmethod
    def parse(cls, entry: Any) -> "Settings":
        """Reads the settings.

        Raises:
            TypeError: A setting has another type.
            ValueError: A setting breaks its rule or is unknown, or there is no such file.
        """
        check_type(isinstance(entry, dict), HERE, 'additional_config["hata"]', "be a dict", entry)
        own = {f.name for f in fields(cls)} - {"config"}
        budget = {f.name for f in fields(HataConfig)} - {"min_sparse_len", "share_selection"}
        unknown, names = sorted(set(entry) - own - budget), ", ".join(sorted(own | budget))
        check(not unknown, HERE, 'additional_config["hata"]', f"name only {names}", unknown)
        for name in ("weights", "top_k"):
            got = "neither" if not entry else f"{sorted(entry)}"
            check(name in entry, HERE, 'additional_config["hata"]', f'have "{name}"', got)
        weights = entry["weights"]
        check_type(isinstance(weights, str), HERE, "weights", "be a path", weights)
        exists = weights == RANDOM or Path(weights).is_file()
        check(exists, HERE, "weights", f'name an existing file or be "{RANDOM}"', weights)
        for name in ("check", "any_version"):
            value = entry.get(name, False)
            check_type(isinstance(value, bool), HERE, name, "be a bool", value)
        observer = entry.get("observer")
        function = observer is None or (isinstance(observer, str) and observer.count(":") == 1)
        check(function, HERE, "observer", 'be like "module:function"', observer)
        check_int(HERE, "measure_every", entry.get("measure_every", 0), 0)
        config = HataConfig(**{name: entry[name] for name in entry if name in budget})
        return cls(config=config, **{name: entry[name] for name in entry if name in own})

    @classmethod
    def of(cls, engine: VllmConfig) -> "Settings":
        """Returns the settings of an engine that hata can serve.

        Raises:
            TypeError: A setting has another type.
            ValueError: There are none, they are wrong, or hata cannot serve this engine.
        """
        entries = engine.additional_config
        entry = entries.get("hata") if isinstance(entries, dict) else None
        rule = 'have an entry "hata" (see hata.integrations.vllm.engine_args)'
        check(entry is not None, HERE, "additional_config", rule, entries)
        settings = cls.parse(entry)
        check_version(settings.any_version)
        size = engine.cache_config.block_size
        check(size & (size - 1) == 0, HERE, "block_size", "be a power of two", size)
        dtype = engine.cache_config.cache_dtype
        rule = f"be one of {', '.join(_KV_CACHE_DTYPES)}"
        check(dtype in _KV_CACHE_DTYPES, HERE, "kv_cache_dtype", rule, dtype)
        context_parallel = engine.parallel_config.decode_context_parallel_size
        check(context_parallel == 1, HERE, "decode_context_parallel_size", "be 1", context_parallel)
        eager = engine.device_config.device_type == "cpu" or engine.model_config.enforce_eager
        check(eager or not settings.check, HERE, "check", "be used with enforce_eager", True)
        seen = parent_process() is None or "PROMETHEUS_MULTIPROC_DIR" in os.environ
        rule = "be 0 where PROMETHEUS_MULTIPROC_DIR, a folder for metrics, is not set"
        check(
            seen or not settings.measure_every, HERE, "measure_every", rule, settings.measure_every
        )
        return settings

    def load(self, engine: VllmConfig) -> HashWeights:
        """Returns the hash weights of the engine's model; a process reads them once.

        Raises:
            ValueError: They are of another model.
        """
        model = engine.model_config
        shape = (
            model.get_total_num_hidden_layers(),
            model.get_total_num_kv_heads(),
            model.get_head_size(),
        )
        self.config.layer_top_k(shape[0])  # raises where it names another number of layers
        full = [i for i, kind in enumerate(layer_types(engine)) if kind == FULL]
        return _load(self.weights, shape).for_model(HERE, *shape, layers=full)


def layer_types(engine: VllmConfig) -> list[str]:
    """Returns what each layer of the engine's model attends to.

    Raises:
        ValueError: A layer attends to something else than the context or its end.
    """
    model = engine.model_config
    named = getattr(model.hf_text_config, "layer_types", None)
    alike = FULL if engine.cache_config.sliding_window is None else SLIDING
    types: list[str] = named or [alike] * model.get_total_num_hidden_layers()
    others = sorted(set(types) - {FULL, SLIDING})
    check(not others, HERE, "the model", f"have {FULL} and {SLIDING} layers alone", others)
    return types


def check_windows(engine: VllmConfig, window: int) -> None:
    """Raises ValueError where hata cannot serve a model with a window in this layer.

    vLLM's hybrid cache manager gives layers with a window a block table of their own, and for that
    wants pages of one size, which those of keys and of codes are not. Without it all layers have
    one block table.
    """
    everywhere, rule = FULL not in layer_types(engine), "have no sliding_window in all layers"
    check(not everywhere, HERE, "the model", rule, window)
    disabled = engine.scheduler_config.disable_hybrid_kv_cache_manager
    rule = "be True for a model with sliding windows"
    check(disabled is True, HERE, "disable_hybrid_kv_cache_manager", rule, disabled)


@cache
def _load(path: str, shape: tuple[int, int, int]) -> HashWeights:
    if path != RANDOM:
        return load_weights(path)
    num_layers, num_kv_heads, head_dim = shape
    return HashWeights.random(num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim)
