"""Captured queries and keys of a model: a folder of safetensors, one file a sequence and layer.

``captures.json`` holds what all files share. Reading touches one layer at a time.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hata.checks import check, check_int
from hata.outputs import CONTINUE, make_output_folder, whole_file
from hata.selectors import Softmax

_FORMAT = "hata.captures"
_INFO_FILE = "captures.json"
FULL_ATTENTION = "full_attention"  # transformers' name


@dataclass(frozen=True)
class CaptureInfo:
    """What the files of a capture share.

    Attributes:
        model: Name of the model.
        num_heads: Query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_dim: Channels of a head.
        softmax_scale: Factor of the model's logits.
        seq_len: Tokens of each sequence.
        num_queries: Query positions sampled from each sequence.
        dtype: Of queries, keys and values: "float32", "bfloat16" or "float16".
        seed: Chose texts and positions.
        has_values: Whether the values were captured too.
        texts: Where the tokens of each sequence come from, one line a sequence.
        layer_types: transformers' name of the kind of each of the model's layers. Those of
            "full_attention", which hata can decode, are captured.
        softcap: Cap of the model's logits, or None; sink logits lie in the layers' files.
        rotary: Angles, ``[head_dim / 2]``, by which the rotary embedding turns channels i and
            ``i + head_dim / 2`` of queries and keys for each position, in radians. Empty where the
            model embeds positions otherwise.
    """

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    seq_len: int
    num_queries: int
    dtype: str
    seed: int
    has_values: bool
    texts: tuple[str, ...]
    layer_types: tuple[str, ...]
    softcap: float | None = None
    rotary: tuple[float, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's index of each captured layer."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL_ATTENTION)

    @property
    def num_layers(self) -> int:
        """Captured layers."""
        return len(self.layers)

    @property
    def num_sequences(self) -> int:
        """Captured sequences."""
        return len(self.texts)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    def softmax(self, sink_logits: Tensor | None) -> Softmax:
        """Returns the softmax of layers with these sink logits, ``[num_kv_heads, group]``."""
        return Softmax(self.softmax_scale, self.softcap, sink_logits)


@dataclass(frozen=True)
class LayerCapture:
    """One layer's queries and keys, after the rotary embedding.

    The query token at position p sees the keys 0..p.

    Attributes:
        q: ``[num_sequences, num_queries, num_heads, head_dim]``.
        k: ``[num_sequences, seq_len, num_kv_heads, head_dim]``.
        v: The same, or None.
        positions: ``[num_sequences, num_queries]``, int64, ascending.
        softmax: The layer's.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    positions: Tensor
    softmax: Softmax


def shard_path(folder: Path, sequence_idx: int, model_layer: int) -> Path:
    """Returns the file of one sequence and layer of the model."""
    return folder / f"sequence-{sequence_idx:04d}-layer-{model_layer:03d}.safetensors"


@dataclass(frozen=True)
class CaptureWriter:
    """Writes a capture, file by file; a file stands under its name only once it is complete.

    Opening a folder that an interrupted capture has left continues it.

    Attributes:
        folder: Where the files lie; made if it does not exist.
        info: What the files share.

    Raises:
        ValueError: The folder holds a capture of something else, or another folder's files.
    """

    folder: Path
    info: CaptureInfo

    def __post_init__(self) -> None:
        """Writes ``captures.json``, or checks the one that stands."""
        where = "capture"
        check(not self.folder.is_file(), where, "folder", "name a folder", self.folder)
        file = self.folder / _INFO_FILE
        if file.exists():
            found = _read_info(self.folder, where)
            new, old = dataclasses.asdict(self.info), dataclasses.asdict(found)
            differing = {name: old[name] for name in new if new[name] != old[name]}
            rule = "be new, or hold a capture with these settings"
            check(not differing, where, "folder", rule, f"{self.folder} with {differing}")
            return
        make_output_folder(self.folder, where, "folder")
        check(not any(self.folder.iterdir()), where, "folder", "be empty", self.folder)
        text = json.dumps({"format": _FORMAT, **dataclasses.asdict(self.info)}, indent=2)
        with whole_file(file, where) as partial:
            partial.write_text(text + "\n")

    def has(self, sequence_idx: int, layer_idx: int) -> bool:
        """Whether this file stands already."""
        return shard_path(self.folder, sequence_idx, self.info.layers[layer_idx]).is_file()

    def write(
        self,
        sequence_idx: int,
        layer_idx: int,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        positions: Tensor,
        sink_logits: Tensor | None = None,
    ) -> None:
        """Writes one layer of one sequence.

        Args:
            sequence_idx: The sequence.
            layer_idx: The layer, counted among those that are captured.
            q: ``[num_queries, num_heads, head_dim]``.
            k: ``[seq_len, num_kv_heads, head_dim]``.
            v: The same as k where ``info.has_values``, else None.
            positions: ``[num_queries]``, int64.
            sink_logits: ``[num_kv_heads, group]``, where the layer has them.

        Raises:
            ValueError: A tensor has NaN or infinities, or the disk is full; the files of other
                layers stay.
        """
        where = "capture"
        model_layer = self.info.layers[layer_idx]
        optional = {"v": v, "sink_logits": sink_logits}
        tensors = {"q": q, "k": k, **{name: x for name, x in optional.items() if x is not None}}
        for name, tensor in tensors.items():
            finite = bool(tensor.isfinite().all())
            got = f"NaN or infinity in layer {model_layer} of sequence {sequence_idx}"
            check(finite, where, name, f"be finite in {self.info.dtype}", got)
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        path = shard_path(self.folder, sequence_idx, model_layer)
        with whole_file(path, where, CONTINUE) as partial:
            save_file({**tensors, "positions": positions}, partial)


@dataclass(frozen=True)
class Captures:
    """A capture on disk.

    Attributes:
        folder: Where its files lie.
        info: What they share.
    """

    folder: Path
    info: CaptureInfo

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Captures":
        """Opens a complete capture.

        Args:
            folder: What `hata capture` wrote.

        Returns:
            The capture; no tensor is read yet.

        Raises:
            ValueError: The folder holds no capture, or an incomplete one.
        """
        where, folder = "Captures.open", Path(folder)
        found = cls(folder, _read_info(folder, where))
        missing = [path.name for path in found._shards() if not path.is_file()]
        rule = "hold a complete capture (run hata capture again)"
        got = f"{folder} without {len(missing)} files, the first {missing[:1]}"
        check(not missing, where, "folder", rule, got)
        return found

    def layer(self, layer_idx: int, *, with_values: bool = False) -> LayerCapture:
        """Reads one layer.

        Args:
            layer_idx: The layer, counted among those that are captured.
            with_values: Whether to read the values too, where they were captured.

        Returns:
            Its tensors, on the CPU, as `LayerCapture` describes them.

        Raises:
            TypeError: ``layer_idx`` is no int.
            ValueError: There is no such layer, or a file is damaged.
        """
        check_int("Captures.layer", "layer_idx", layer_idx, 0, self.info.num_layers - 1)
        cpu = torch.device("cpu")
        shards = [
            self.shard(i, layer_idx, cpu, with_values=with_values)
            for i in range(self.info.num_sequences)
        ]
        softmax = self.info.softmax(shards[0].pop("sink_logits", None))  # the same in all sequences
        stacked = {name: torch.stack([shard[name] for shard in shards]) for name in shards[0]}
        return LayerCapture(
            stacked["q"], stacked["k"], stacked.get("v"), stacked["positions"], softmax
        )

    def shard(
        self,
        sequence_idx: int,
        layer_idx: int,
        device: torch.device,
        *,
        with_values: bool = False,
    ) -> dict[str, Tensor]:
        """Reads one layer of one sequence.

        Args:
            sequence_idx: The sequence.
            layer_idx: The layer, counted among those that are captured.
            device: Where to put the tensors.
            with_values: Whether to read the values too, where they were captured.

        Returns:
            "q", "k", "v" where it was read, and "positions": `LayerCapture`'s, of this sequence;
            "sink_logits", ``[num_kv_heads, group]``, where the layer has them.

        Raises:
            ValueError: The file is damaged.
        """
        info = self.info
        path = shard_path(self.folder, sequence_idx, info.layers[layer_idx])
        row = (info.seq_len, info.num_kv_heads, info.head_dim)
        shapes: dict[str, tuple[int, ...]] = {
            "q": (info.num_queries, info.num_heads, info.head_dim),
            "k": row,
            **({"v": row} if with_values and info.has_values else {}),
            "positions": (info.num_queries,),
        }
        try:
            with safe_open(path, framework="pt") as file:
                if "sink_logits" in set(file.keys()):
                    shapes["sink_logits"] = (info.num_kv_heads, info.group)
                tensors = {name: file.get_tensor(name).to(device) for name in shapes}
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"hata.Captures.layer: {path} must be readable, got {error}"
            ) from error
        for name, shape in shapes.items():
            got = tuple(tensors[name].shape)
            check(got == shape, "Captures.layer", f"{name} of {path}", f"have shape {shape}", got)
        return tensors

    def _shards(self) -> Iterator[Path]:
        for sequence_idx in range(self.info.num_sequences):
            for model_layer in self.info.layers:
                yield shard_path(self.folder, sequence_idx, model_layer)


def _read_info(folder: Path, function: str) -> CaptureInfo:
    file = folder / _INFO_FILE
    check(file.is_file(), function, "folder", f"hold a capture ({_INFO_FILE})", folder)
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        check(found.pop("format", None) == _FORMAT, function, "folder", "hold a capture", folder)
        found.pop("num_layers", None)  # what layer_types says too, in older files
        for name in ("texts", "layer_types", "rotary"):
            found[name] = tuple(found.get(name, ()))
        return CaptureInfo(**found)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"hata.{function}: {file} must be as hata capture wrote it, got {error}"
        ) from error
