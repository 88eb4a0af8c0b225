"""Draw docs/sample.png: a small photograph-like picture, made by the project and given away (CC0 1.0).

    python scripts/make_sample.py [OUTPUT]

It holds what matters to content-aware quantization: a smooth sky, soft woods, busy grass and foliage, and
hard regular detail (bricks, windows, a sign). One seeded generator, and shapes drawn four times too large and
averaged: the same picture comes out every time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, OVERSAMPLING = 240, 160, 4
SEED = 2022

# A 5x7 alphabet for the sign, one row of bits per line of a letter.
LETTERS = {
    "C": "01110 10001 10000 10000 10000 10001 01110",
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "I": "01110 00100 00100 00100 00100 00100 01110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    " ": "00000 00000 00000 00000 00000 00000 00000",
}


def fractal(rng, height, width, octaves, first=2, gain=0.55):
    """Sum of smoothly interpolated noise of ever finer grain, in about [-1, 1], (height, width)."""
    total = np.zeros((height, width))
    weight, cells = 1.0, first
    for _ in range(octaves):
        rows, cols = cells + 1, cells * width // height + 2
        lattice = rng.uniform(-1, 1, (rows + 1, cols + 1))
        y = np.linspace(0, rows - 1e-6, height)
        x = np.linspace(0, cols - 1e-6, width)
        iy, ix = y.astype(int), x.astype(int)
        fy, fx = y - iy, x - ix
        fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
        top = lattice[np.ix_(iy, ix)] * (1 - fx) + lattice[np.ix_(iy, ix + 1)] * fx
        bottom = lattice[np.ix_(iy + 1, ix)] * (1 - fx) + lattice[np.ix_(iy + 1, ix + 1)] * fx
        total += weight * (top * (1 - fy[:, None]) + bottom * fy[:, None])
        weight *= gain
        cells *= 2
    return total / 1.6


def mix(canvas, color, amount):
    """Blend a color, (3,) or (H, W, 3) in 0..255, over the canvas in place; amount is (H, W) in [0, 1]."""
    canvas += np.asarray(amount)[..., None] * (np.asarray(color, float) - canvas)


def draw_land(rng, height, width):
    """Sky with clouds, three ranges of hills in haze, grass."""
    y, x = np.mgrid[0:height, 0:width] / height
    sky = np.stack([90 + 110 * y, 140 + 75 * y, 205 + 30 * y], axis=2)
    canvas = sky.copy()
    clouds = fractal(rng, height, width, 6)
    mix(canvas, (244, 243, 240), np.clip(clouds * 1.4 - 0.25 - 1.2 * (y - 0.12), 0, 0.85))
    sun = np.exp(-((x - 1.28) ** 2 + (y - 0.16) ** 2) / 0.004)
    mix(canvas, (255, 248, 220), np.clip(sun, 0, 1))
    hills = ((0.46, 0.10, (132, 152, 178)), (0.56, 0.08, (96, 124, 118)), (0.66, 0.06, (62, 96, 60)))
    for k, (level, swing, color) in enumerate(hills):
        edge = level + swing * fractal(rng, 8, width, 5)[4]
        texture = fractal(rng, height, width, 5 + k) * (8 + 8 * k)
        inside = np.clip((y - edge[None]) * height / 2, 0, 1)
        mix(canvas, np.clip(np.array(color) + texture[..., None], 0, 255), inside)
    blades = rng.normal(0, 1, (height, width))
    blades = (blades + np.roll(blades, 1, 0) + np.roll(blades, 2, 0) + np.roll(blades, 3, 0)) / 2
    ground = np.array((86, 116, 48)) + (16 * blades + 20 * fractal(rng, height, width, 6))[..., None]
    mix(canvas, np.clip(ground, 0, 255), np.clip((y - 0.80) * 40, 0, 1))
    return canvas


def draw_house(rng, canvas, s):
    """A brick front with windows, a roof and a sign; all measures are pixels of the small picture times s."""
    top, bottom, left, right = 62 * s, 140 * s, 22 * s, 122 * s
    y, x = np.mgrid[top:bottom, left:right]
    course = (y - top) // (4 * s)
    shifted = x - left + (course % 2) * 4 * s
    brick = shifted // (8 * s)
    mortar = ((y - top) % (4 * s) < s * 0.8) | (shifted % (8 * s) < s * 0.8)
    tint = rng.uniform(-22, 22, (64, 64))[course % 64, brick % 64]
    front = np.stack([158 + tint, 84 + 0.7 * tint, 66 + 0.5 * tint], axis=2)
    front[mortar] = (176, 168, 156)
    light = 1.05 - 0.25 * (x - left) / (right - left)
    canvas[top:bottom, left:right] = front * light[..., None]
    for row in range(2):
        for col in range(4):
            draw_window(canvas, (70 + 30 * row) * s, (29 + 24 * col) * s, s, (row + col) % 3)
    rise, overhang = 26 * s, 4 * s
    for step in range(rise):
        inset = int((1 - step / rise) * (right - left) / 2.2)
        row = top - rise + step
        shade = 70 + 26 * ((step // (2 * s)) % 2) - 10 * (step % (2 * s) < s // 2)
        canvas[row, left - overhang + inset : right + overhang - inset] = (shade + 14, shade, shade - 2)


def draw_window(canvas, top, left, s, kind):
    """A sash window, 14x20 small pixels, with reflection or curtains."""
    height, width = 20 * s, 14 * s
    canvas[top - s : top + height + s, left - s : left + width + s] = (232, 228, 218)
    y, x = np.mgrid[0:height, 0:width] / height
    glass = np.stack([52 + 60 * y, 66 + 66 * y, 84 + 74 * y], axis=2)
    if kind == 1:
        folds = 22 * np.sin(x * 70)
        glass[:, : width // 3] = (np.array((206, 196, 178)) + folds[..., None])[:, : width // 3]
    elif kind == 2:
        glass[np.abs(x - 0.6 * y - 0.1) < 0.08] = (196, 208, 220)
    canvas[top : top + height, left : left + width] = glass
    canvas[top + height // 2 - s // 2 : top + height // 2 + s // 2, left : left + width] = (226, 222, 212)
    canvas[top : top + height, left + width // 2 - s // 2 : left + width // 2 + s // 2] = (226, 222, 212)


def draw_sign(canvas, s):
    """A board with letters whose strokes are one small pixel wide."""
    text, top, left = "CAFE 4 BITS", 128 * s, 38 * s
    canvas[top - 2 * s : top + 10 * s, left - 3 * s : left + 69 * s] = (34, 52, 46)
    for k, letter in enumerate(text):
        for i, bits in enumerate(LETTERS[letter].split()):
            for j, bit in enumerate(bits):
                if bit == "1":
                    y, x = top + (i + 1) * s - s // 2, left + (6 * k + j) * s
                    canvas[y : y + s, x : x + s] = (240, 226, 170)


def draw_tree(rng, canvas, s):
    """A crown of leaves in front of the hills, and a fence."""
    height, width = canvas.shape[:2]
    y, x = np.mgrid[0:height, 0:width] / s
    trunk = (np.abs(x - 186 - 1.5 * np.sin(y / 9)) < 3.2 - (y - 120) * -0.02) & (y > 96) & (y < 142)
    canvas[trunk] = (74, 56, 42)
    ragged = fractal(rng, height, width, 7, first=6, gain=0.75)
    distance = np.hypot((x - 186) / 36, (y - 78) / 34)
    crown = np.clip((1.0 - distance + 0.38 * ragged) * 6, 0, 1)
    leaves = fractal(rng, height, width, 4, first=40, gain=0.8)
    shade = 0.75 + 0.45 * leaves + 0.012 * (186 - x) - 0.006 * (y - 78)
    mix(canvas, np.clip(np.array((66, 104, 42)) * shade[..., None], 0, 255), crown)
    for k in range(15):
        left = int((134 + 7 * k) * s)
        canvas[132 * s : 150 * s, left : left + 3 * s] = (214, 206, 192)
        canvas[132 * s : 150 * s, left + 3 * s - s // 2 : left + 3 * s] = (150, 142, 130)
    for row in (136, 144):
        canvas[row * s : row * s + s + s // 2, 134 * s : 235 * s] = (200, 190, 176)


def make_sample() -> Image.Image:
    """Draw the picture, 240x160 RGB."""
    rng = np.random.default_rng(SEED)
    s = OVERSAMPLING
    canvas = draw_land(rng, HEIGHT * s, WIDTH * s)
    draw_house(rng, canvas, s)
    draw_sign(canvas, s)
    draw_tree(rng, canvas, s)
    small = canvas.clip(0, 255).reshape(HEIGHT, s, WIDTH, s, 3).mean(axis=(1, 3))
    grain = rng.normal(0, 1.2, small.shape)
    return Image.fromarray(np.floor(small + grain + 0.5).clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "sample.png"
    make_sample().save(target, optimize=True)
