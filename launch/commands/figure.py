"""Figures of rectangles and text, written as SVG, or as PNG through pillow.

What a figure shows is decided elsewhere. Lengths are in pixels.
"""

import colorsys
import io
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

from turnout.data.files import write_atomically
from turnout.training.errors import ConfigError

GOLDEN_RATIO = 0.618033988749895
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 27)  # pillow refuses to open larger images
FIGURE_SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    fill: str
    tip: str  # a browser shows it under the mouse pointer


@dataclass(frozen=True)
class Label:
    """A line of text that begins at x or is centred on x; vertically it is centred on y."""

    x: float
    y: float
    text: str
    size: float
    is_centred: bool


@dataclass
class Figure:
    width: float
    height: float
    boxes: list[Box] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)

    def add_box(self, x: float, y: float, width: float, height: float, fill: str, tip: str = "") -> None:
        self.boxes.append(Box(x, y, width, height, fill, tip))

    def add_label(self, x: float, y: float, text: str, *, size: float = 12, is_centred: bool = False) -> None:
        self.labels.append(Label(x, y, text, size, is_centred))

    def save(self, path: Path) -> None:
        """Write the figure in the format that the suffix names, .svg or .png.

        Raises ConfigError if it is too large for a PNG.
        """
        self.check_size(path)
        write_atomically(path, self._svg().encode() if path.suffix == ".svg" else self._png())

    def check_size(self, path: Path) -> None:
        """Raise ConfigError for a PNG with more pixels than programs open."""
        assert path.suffix in FIGURE_SUFFIXES
        if path.suffix == ".png" and self.width * self.height > MAX_PIXELS:
            raise ConfigError(
                f"--out {path}: {self.width:.0f} x {self.height:.0f} pixels are more than the "
                f"{MAX_PIXELS:,} that a PNG may have; write an .svg, or give a shorter text"
            )

    def _svg(self) -> str:
        size = f'width="{self.width:g}" height="{self.height:g}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" xml:space="preserve">'
        ]
        lines.append(f'<rect {size} fill="#ffffff"/>')
        for box in self.boxes:
            place = f'x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}"'
            lines.append(f'<rect {place} fill="{box.fill}"><title>{escape(box.tip)}</title></rect>')
        for label in self.labels:
            anchor = "middle" if label.is_centred else "start"
            place = f'x="{label.x:g}" y="{label.y:g}" font-size="{label.size:g}" text-anchor="{anchor}"'
            lines.append(f'<text {place} dominant-baseline="central">{escape(label.text)}</text>')
        return "\n".join([*lines, "</svg>\n"])

    def _png(self) -> bytes:
        image = Image.new("RGB", (round(self.width), round(self.height)), "#ffffff")
        draw = ImageDraw.Draw(image)
        for box in self.boxes:
            right, bottom = box.x + box.width - 1, box.y + box.height - 1
            if right >= box.x and bottom >= box.y:
                draw.rectangle((box.x, box.y, right, bottom), fill=box.fill)
        for label in self.labels:
            font = ImageFont.load_default(label.size)
            anchor = "mm" if label.is_centred else "lm"
            draw.text((label.x, label.y), label.text, fill="#000000", font=font, anchor=anchor)
        content = io.BytesIO()
        image.save(content, "png")
        return content.getvalue()


def expert_colour(expert: int) -> str:
    """Return the colour of an expert, light enough for black text; neighbouring ids differ most in hue."""
    return to_hex(*colorsys.hls_to_rgb(expert * GOLDEN_RATIO % 1, 0.72, 0.6))


def ratio_colour(log2_ratio: float, largest: float = 3.0) -> str:
    """Return white for 0, stronger red the higher and stronger blue the lower the ratio, up to `largest`."""
    strength = min(abs(log2_ratio) / largest, 1.0)
    faded = 1 - 0.75 * strength
    return to_hex(1, faded, faded) if log2_ratio > 0 else to_hex(faded, faded, 1)


def to_hex(red: float, green: float, blue: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))
