"""`python -m docs.pictures` draws the pictures of the documentation beside this file."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from . import layouts, measured, pipeline, prediction, ranges, segments
from .style import save, settings

PICTURES: dict[str, Callable[[], Figure]] = {
    "layout-document": layouts.draw_document_layout,
    "layout-row": layouts.draw_row_layout,
    "layout-two-part": layouts.draw_two_parts,
    "ranges": ranges.draw_ranges,
    "pipeline": pipeline.draw_pipeline,
    "segments": segments.draw_segments,
    "tiles": segments.draw_tiles,
    "efficiency": measured.draw_efficiency,
    "speed": measured.draw_speed,
    "masks": measured.draw_masks,
    "prediction": prediction.draw_prediction,
    "memory": prediction.draw_memory,
}


def draw_all(folder: Path) -> None:
    """Write each of the `PICTURES` as an SVG file into `folder`."""
    with settings():
        for name, draw in PICTURES.items():
            save(draw(), folder / f"{name}.svg")


if __name__ == "__main__":
    draw_all(Path(__file__).parent)
