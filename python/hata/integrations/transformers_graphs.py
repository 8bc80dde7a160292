"""Decoding passes of a transformers model in CUDA graphs.

A forward pass that decodes is hundreds of launches from Python, which take longer than the kernels
do. `DecodeGraphs` stands before the model's ``forward``: passes that decode into a
`HataTransformersCache` are captured once and then replayed, for sequences of every length, since
the kernels read lengths and positions from the device.
"""

import inspect
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from hata.cache import HataCache
from hata.integrations.transformers_cache import CACHE_ARGUMENT, HataTransformersCache
from hata.integrations.transformers_mask import HERE


@dataclass(frozen=True)
class _Pass:
    """One forward pass that decodes.

    Attributes:
        cache: The cache.
        hata_cache: What its layers decode into.
        q_len: New tokens of a sequence.
        seq_len_range: Least and greatest length that a graph of it is good for.
        tensors: Its arguments that change from pass to pass.
        others: Those that do not.
    """

    cache: HataTransformersCache
    hata_cache: HataCache
    q_len: int
    seq_len_range: tuple[int, int]
    tensors: dict[str, Tensor]
    others: dict[str, Any]

    @property
    def kind(self) -> tuple[object, ...]:
        """What it has in common with the other passes of a graph."""
        tensors = [(name, t.shape, t.dtype) for name, t in sorted(self.tensors.items())]
        return (self.cache.verifying, self.seq_len_range, *tensors, *sorted(self.others.items()))


@dataclass(frozen=True)
class _Graph:
    """A captured pass.

    Attributes:
        graph: The graph.
        inputs: The tensors that it reads.
        logits: What it writes.
        output: The class of what the pass returns.
    """

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    logits: Tensor
    output: type[ModelOutput]

    def run(self, tensors: dict[str, Tensor]) -> Tensor:
        """Replays it for other inputs; returns the logits, which the next replay overwrites."""
        for name, t in self.inputs.items():
            t.copy_(tensors[name])
        self.graph.replay()
        return self.logits


class DecodeGraphs:
    """The graphs of one model's decoding, one for each kind of pass and cache.

    The first pass of a kind runs eagerly and allocates, a later one is captured. Whether a model
    can be captured is found out once for each kind: an eager pass must not wait for the device,
    and a replay at another length must give the eager pass's logits bit for bit. A model that fails
    stays eager, with a warning. A graph lives until its cache takes another prompt.

    Args:
        required: Raise RuntimeError in place of the warning.
    """

    def __init__(self, *, required: bool) -> None:
        self.required = required
        # None where there was a pass of the kind, which has allocated what a capture may not.
        self._graphs: WeakKeyDictionary[HataCache, dict[object, _Graph | None]] = (
            WeakKeyDictionary()
        )
        self._watched: set[object] = set()  # kinds that do not wait
        self._compared: set[object] = set()  # kinds whose replays are right
        self._refused = False

    def __deepcopy__(self, memo: object) -> "DecodeGraphs":
        """Returns new ones: a graph holds the addresses of one model's weights."""
        return DecodeGraphs(required=self.required)

    def run(self, model: Any, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Runs one forward pass, by a graph where it decodes.

        Args:
            model: The model.
            forward: Its forward pass.
            arguments: The arguments by name.

        Returns:
            What ``forward(**arguments)`` returns.

        Raises:
            RuntimeError: Graphs are required, and the model cannot be captured.
        """
        step = None if self._refused else self._decoding_pass(model, arguments)
        if step is None:
            return forward(**arguments)
        kind, graphs = step.kind, self._graphs.setdefault(step.hata_cache, {})
        if kind not in graphs:
            graphs[kind] = None
            return forward(**arguments)
        if kind not in self._watched:
            output, waits = _watch(forward, arguments)
            if waits:
                self._refuse("a pass waits for the device")
            self._watched.add(kind)
            return output
        graph = graphs[kind]
        if graph is not None and kind not in self._compared:
            output, is_right = _compare(graph, step, forward, arguments)
            if not is_right:
                self._refuse("a replay gives other logits than an eager pass")
            self._compared.add(kind)
            return output
        step.cache.extend(step.q_len)
        with torch.cuda.device(step.hata_cache.device):
            graph = graph or self._capture(model, forward, step)
            if graph is None:
                return forward(**arguments)
            graphs[kind] = graph
            logits = graph.run(step.tensors).clone()
        step.cache.replayed(step.q_len)
        return graph.output(**{"logits": logits, CACHE_ARGUMENT: step.cache})

    def _decoding_pass(self, model: Any, arguments: dict[str, Any]) -> _Pass | None:
        """Returns the pass if it decodes and does nothing that a graph would leave out."""
        cache = arguments.get(CACHE_ARGUMENT)
        if not isinstance(cache, HataTransformersCache) or len(cache.hata_caches) != 1:
            return None
        (hata_cache,) = cache.hata_caches
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.shape[0] != hata_cache.batch:
            return None
        q_len = tokens.shape[1]
        if not cache.decodes(q_len):
            self._graphs.pop(hata_cache, None)
            return None
        plain = cache.capturable and not (
            torch.is_grad_enabled()
            or model.training
            or torch.is_autocast_enabled("cuda")
            or torch.cuda.is_current_stream_capturing()
        )
        tensors, others = {}, {}
        for name, value in arguments.items():
            if name == "attention_mask":  # decoding does not read it, beyond its columns
                plain &= value is None or (isinstance(value, Tensor) and value.dim() == 2)
            elif isinstance(value, Tensor):
                tensors[name] = value
            elif name != CACHE_ARGUMENT and value is not None:
                plain &= isinstance(value, bool | int | float | str)
                others[name] = value
        if not plain:
            return None
        seen = cache.get_seq_length()
        if "position_ids" not in tensors:
            positions = torch.arange(seen, seen + q_len, device=tokens.device)
            tensors["position_ids"] = positions.expand(tokens.shape[0], -1)
        return _Pass(
            cache=cache,
            hata_cache=hata_cache,
            q_len=q_len,
            seq_len_range=_seq_len_range(hata_cache, q_len),
            tensors=tensors,
            others=others,
        )

    def _capture(self, model: Any, forward: Callable[..., Any], step: _Pass) -> _Graph | None:
        """Captures a pass, in a step that is open; None where that must not or cannot be."""
        if any(m is not model and _has_hooks(m) for m in model.modules()):
            return None  # as long as there are hooks, which replays would not call
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.inference_mode(
                    False
                ),  # or passes outside of it could not write to the inputs
                torch.no_grad(),
                step.cache.captured(step.seq_len_range),
            ):
                inputs = {name: t.clone() for name, t in step.tensors.items()}
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    output = forward(**inputs, **step.others, **{CACHE_ARGUMENT: step.cache})
        except RuntimeError as error:
            self._refuse(f"they refuse a pass: {error}")
            return None
        if not isinstance(output, ModelOutput) or set(output) != {"logits", CACHE_ARGUMENT}:
            self._refuse(f"a pass returns more than logits: {type(output).__name__}")
            return None
        return _Graph(graph, inputs, output["logits"], type(output))

    def _refuse(self, reason: str) -> None:
        message = f"hata.{HERE}: decoding cannot run in CUDA graphs, since {reason}"
        if self.required:
            raise RuntimeError(message)
        self._refused = True
        self._graphs.clear()
        warnings.warn(f"{message}; it stays eager", stacklevel=2)


def graphed_forward(model: Any) -> Callable[..., Any]:
    """Returns what stands in for the model's ``forward``, with its signature."""
    original = type(model).forward
    names = list(inspect.signature(original).parameters)[1:]

    @wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        arguments = dict(zip(names, args, strict=False), **kwargs)
        return self._hata.graphs.run(self, MethodType(original, self), arguments)

    return MethodType(forward, model)


def _seq_len_range(cache: HataCache, q_len: int) -> tuple[int, int]:
    """Lengths among which the layers of a pass are dense alike, sparse alike, or of both kinds."""
    lengths, least = [n + q_len for n in cache.seq_lens], cache.min_sparse_len
    if max(lengths) < least:
        return 0, least - 1
    return (least if min(lengths) >= least else 0), cache.max_seq_len


def _watch(forward: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, bool]:
    """Runs a pass eagerly; also returns whether this thread waits for the device in it."""
    waits, thread, before = [], threading.get_ident(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            if "synchronizing CUDA operation" not in str(message):
                show(message, *args, **kwargs)
            elif threading.get_ident() == thread:
                waits.append(message)

        warnings.showwarning = note
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            output = forward(**arguments)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return output, bool(waits)


def _compare(
    graph: _Graph, step: _Pass, forward: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[Any, bool]:
    """Runs a pass eagerly and by its graph; also returns whether both do the same."""
    states = step.cache.states
    before = [state.clone() for state in states]
    output = forward(**arguments)
    after = [state.clone() for state in states]
    for state, old in zip(states, before, strict=True):
        state.copy_(old)
    with torch.cuda.device(step.hata_cache.device):
        logits = graph.run(step.tensors)  # writes the same keys in the same places again
    is_right = torch.equal(output["logits"], logits)
    is_right &= all(torch.equal(*pair) for pair in zip(states, after, strict=True))
    for state, new in zip(states, after, strict=True):
        state.copy_(new)
    return output, is_right


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
