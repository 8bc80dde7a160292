"""What an unfinished training run has on disk: finished layers and a checkpoint."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hata.checks import check
from hata.outputs import CONTINUE, whole_file

_WHERE = "train"


@dataclass(frozen=True)
class LayerPart:
    """What came of one layer.

    Attributes:
        key_weights: ``[num_kv_heads, head_dim, num_bits]``.
        query_weights: The same, or None.
        losses: ``[num_steps]``, mean over KV heads.
        scores: ``[3, num_budgets]``, means over held-out queries and KV heads: attention mass that
            was not selected, the same for the exact top-k, and recall of the exact top-k.
    """

    key_weights: Tensor
    query_weights: Tensor | None
    losses: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """Some layers in the midst of training.

    Attributes:
        layers: Which.
        step: The step to take next.
        fit: State of the fit.
        optimizer: State of the optimizer.
        losses: ``[num_layers, num_steps]``, known up to ``step``.
    """

    layers: list[int]
    step: int
    fit: dict[str, Any]
    optimizer: dict[str, Any]
    losses: Tensor


@dataclass(frozen=True)
class Parts:
    """The folder of an unfinished run.

    Attributes:
        folder: Where it is.
    """

    folder: Path

    @classmethod
    def open(cls, out: Path, settings: dict[str, Any]) -> "Parts":
        """Makes the folder beside ``out``, or opens that of an interrupted run.

        Raises:
            ValueError: The interrupted run had other settings, or the place is no folder.
        """
        check(out.parent.is_dir(), _WHERE, "--out", "lie in an existing folder", out)
        folder = out.with_name(out.name + ".parts")
        file = folder / "settings.json"
        text = json.dumps(settings, indent=2, sort_keys=True)
        if file.is_file():
            old: dict[str, Any] = json.loads(file.read_text())
            new = json.loads(text)
            names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
            rule = f"be new, or have the settings of the interrupted run in {folder}"
            check(not names, _WHERE, "--out", rule, f"other {', '.join(names)}")
        else:
            folder.mkdir(exist_ok=True)
            with whole_file(file, _WHERE, CONTINUE) as partial:
                partial.write_text(text)
        return cls(folder)

    def has(self, layer_idx: int) -> bool:
        """Whether this layer is finished."""
        return self._layer(layer_idx).is_file()

    def write(self, layer_idx: int, part: LayerPart) -> None:
        """Writes a finished layer.

        Raises:
            ValueError: The disk is full; the other layers stay.
        """
        tensors = {
            field.name: getattr(part, field.name).contiguous()
            for field in dataclasses.fields(part)
            if getattr(part, field.name) is not None
        }
        with whole_file(self._layer(layer_idx), _WHERE, CONTINUE) as partial:
            save_file(tensors, partial)

    def read(self, layer_idx: int) -> LayerPart:
        """Reads a finished layer."""
        tensors = load_file(self._layer(layer_idx))
        return LayerPart(query_weights=tensors.pop("query_weights", None), **tensors)

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Writes the only checkpoint.

        Raises:
            ValueError: The disk is full; the former checkpoint stays.
        """
        state = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
        with whole_file(self._checkpoint, _WHERE, CONTINUE) as partial:
            torch.save(state, partial)

    def read_checkpoint(self) -> Checkpoint | None:
        """Reads the checkpoint, if there is one."""
        if not self._checkpoint.is_file():
            return None
        return Checkpoint(**torch.load(self._checkpoint, weights_only=True, map_location="cpu"))

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _layer(self, layer_idx: int) -> Path:
        return self.folder / f"layer-{layer_idx:03d}.safetensors"
