"""The attention mass per layer as a picture."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure


def plot_mass(path: Path, mass: Mapping[int, float], num_layers: int, title: str) -> None:
    """Writes a bar for each layer: the share of the dense attention mass that was selected.

    Args:
        path: The PNG file to write.
        mass: Share by layer, 0 to 1; layers that are not in it attend densely.
        num_layers: Layers of the model.
        title: The line above the bars.
    """
    layers = range(num_layers)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.subplots()
        colors = ["tab:blue" if layer in mass else "lightgray" for layer in layers]
        axes.bar(layers, [mass.get(layer, 1.0) for layer in layers], color=colors)
        axes.set(xlabel="layer (gray: dense)", ylabel="share of attention mass", ylim=(0, 1))
        axes.set_title(title)
        figure.savefig(path, dpi=150)
