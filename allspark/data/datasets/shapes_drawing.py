"""Draws the images of the shapes data set: image i of a split depends only on (SEED, split, i).

All in float64 numpy with `Generator.random` on PCG64, whose stream is stable between numpy versions. No drawing library
is used, because their output changes between versions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from allspark.data.spec import IGNORE_INDEX

SEED = 20240
SIZE = 128  # pixels, height and width of every image
SPLITS = ("train", "val")

Y, X = np.mgrid[0:SIZE, 0:SIZE] + 0.5  # pixel centers

Field = np.ndarray  # (h, w) float64
Outline = Callable[[Field, Field], Field]  # local coordinates in pixels -> signed distance in pixels, negative inside
Texture = Callable[["Local", Generator], Field]  # -> blend between a shape's two colors, 0..1


@dataclass(frozen=True)
class Shape:
    """A shape to paint; label 0 is clutter; x, y, size and reach in pixels, angle in radians."""

    label: int
    x: float
    y: float
    angle: float
    size: float  # radius of the disk with the same area
    reach: float  # largest distance of a point of the shape from (x, y)
    outline: Outline
    texture: Texture


@dataclass(frozen=True)
class Local:
    """The pixels around a shape in its own coordinates, all (h, w) in pixels; light from light_direction."""

    u: Field
    v: Field
    distance: Field
    shape: Shape
    light: np.ndarray


def render(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image (SIZE, SIZE, 3) uint8 and its mask (SIZE, SIZE) uint8, with ignored pixels at object borders."""
    rng = np.random.Generator(np.random.PCG64([SEED, SPLITS.index(split), index]))
    image = background(rng)
    mask = np.zeros((SIZE, SIZE), np.uint8)
    light = light_direction(rng)
    for shape in scene(rng):
        paint(image, mask, shape, light, rng)
    return develop(image, light, rng), mask


# Random numbers and fields


def uniform(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def log_uniform(rng: Generator, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


def pick(rng: Generator, options: list | tuple):
    return options[int(rng.random() * len(options))]


def random_color(rng: Generator, saturation: tuple[float, float], value: tuple[float, float], hue: float | None = None):
    """(3,) RGB in 0..1; hue is 0..1 around the color wheel, random if None."""
    hue = 6 * (rng.random() if hue is None else hue)
    s, v = uniform(rng, *saturation), uniform(rng, *value)
    return v * (1 - s * np.clip(2 - np.abs((hue + np.array([0.0, 4.0, 2.0])) % 6 - 3), 0, 1))


def mix(a: np.ndarray, b: np.ndarray, t: Field) -> np.ndarray:
    """Blend a (t = 0) into b (t = 1), (3,) or (h, w, 3) each; t (h, w)."""
    return a + (b - a) * t[..., None]


def wave(phase: Field, width: float) -> Field:
    """A square wave of period 1 with values 0..1; `width` is the part of a period in which it changes sides."""
    return 0.5 + 0.5 * np.clip(np.sin(2 * np.pi * phase) / (np.pi * width), -1, 1)


def noise(rng: Generator, cells: int) -> Field:
    """(SIZE, SIZE) smooth noise in 0..1 with grains SIZE / cells pixels wide."""
    grid = rng.random((cells + 1, cells + 1))
    position = (np.arange(SIZE) + 0.5) / SIZE * cells
    left = position.astype(int)
    t = position - left
    t = t * t * (3 - 2 * t)
    rows = grid[left] + (grid[left + 1] - grid[left]) * t[:, None]
    return rows[:, left] + (rows[:, left + 1] - rows[:, left]) * t


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (SIZE, SIZE, 3), sigma in pixels and at most 1.3."""
    steps = np.arange(-4, 5)
    kernel = np.exp(-0.5 * (steps / sigma) ** 2)
    kernel /= kernel.sum()
    for _ in range(2):  # along the columns, then, transposed, along the rows
        padded = np.pad(image, ((4, 4), (0, 0), (0, 0)), mode="edge")
        image = sum(w * padded[i : i + SIZE] for i, w in enumerate(kernel)).transpose(1, 0, 2)
    return image


# Background, light and camera


def gradient(rng: Generator) -> Field:
    angle = uniform(rng, 0, 2 * np.pi)
    return np.clip(0.5 + ((X - SIZE / 2) * np.cos(angle) + (Y - SIZE / 2) * np.sin(angle)) / SIZE, 0, 1)


def clouds(rng: Generator) -> Field:
    cells = pick(rng, (2, 3, 5))
    field = sum(noise(rng, cells * 2**octave) / 2**octave for octave in range(5))
    return np.clip((field - 0.97) * 1.3 + 0.5, 0, 1)


def grain(rng: Generator) -> Field:
    return np.clip(0.5 + 1.2 * (noise(rng, pick(rng, (24, 40, 64))) - 0.5) + 0.6 * (noise(rng, 6) - 0.5), 0, 1)


def waves(rng: Generator) -> Field:
    angle, period = uniform(rng, 0, np.pi), log_uniform(rng, 7, 40)
    bend = uniform(rng, 0, 30) * (noise(rng, 3) - 0.5)
    return wave((X * np.cos(angle) + Y * np.sin(angle) + bend) / period, pick(rng, (0.15, 0.3, 0.6)))


def tiles(rng: Generator) -> Field:
    angle, period, width = uniform(rng, 0, np.pi), log_uniform(rng, 16, 60), pick(rng, (0.05, 0.3, 0.6))
    a = wave((X * np.cos(angle) + Y * np.sin(angle)) / period + rng.random(), width)
    b = wave((Y * np.cos(angle) - X * np.sin(angle)) / period + rng.random(), width)
    return a + b - 2 * a * b


def pebbles(rng: Generator) -> Field:
    """Flat cells around random points."""
    points = rng.random((8 + int(rng.random() * 20), 3))
    distance = [(X - x * SIZE) ** 2 + (Y - y * SIZE) ** 2 for x, y in points[:, :2]]
    return points[np.argmin(distance, 0), 2]


BACKGROUNDS = (gradient, clouds, grain, waves, tiles, pebbles)


def background(rng: Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) in 0..1: two textures, each between two related colors, blended over the image."""
    first, second = (backdrop(rng) for _ in range(2))
    where = np.clip((noise(rng, 2) - uniform(rng, 0.3, 0.9)) * 6, 0, 1)
    return mix(first, second, where)


def backdrop(rng: Generator) -> np.ndarray:
    base = random_color(rng, (0, 0.4), (0.2, 0.9))
    other = base + uniform(rng, 0.3, 1) * (random_color(rng, (0, 0.5), (0.1, 1)) - base)
    return mix(base, other, pick(rng, BACKGROUNDS)(rng))


def light_direction(rng: Generator) -> np.ndarray:
    """(3,) unit vector toward the light: x right, y down, z to the viewer."""
    angle, height = uniform(rng, 0, 2 * np.pi), uniform(rng, 0.5, 0.8)
    flat = np.sqrt(1 - height**2)
    return np.array([flat * np.cos(angle), flat * np.sin(angle), height])


def develop(image: np.ndarray, light: np.ndarray, rng: Generator) -> np.ndarray:
    """Light and camera: falloff, cast shadow, tint, contrast, blur, sensor noise. (SIZE, SIZE, 3) 0..1 -> uint8."""
    falloff = 1 + uniform(rng, 0, 0.5) * ((X - SIZE / 2) * light[0] + (Y - SIZE / 2) * light[1]) / SIZE
    if rng.random() < 0.35:
        falloff *= 1 - uniform(rng, 0.2, 0.5) * np.clip((noise(rng, 2) - 0.5) * uniform(rng, 6, 20), 0, 1)
    image = image * falloff[..., None] * (1 + 0.25 * (rng.random(3) - 0.5))
    image = 0.5 + uniform(rng, 0.65, 1.1) * (image - 0.5) + uniform(rng, -0.08, 0.08)
    if rng.random() < 0.5:
        image = blur(image, uniform(rng, 0.4, 1.3))
    bell = sum(rng.random(image.shape) for _ in range(3)) * 2 - 3  # variance 1
    image = image + log_uniform(rng, 0.005, 0.05) * bell
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


# Outlines: (rng, size) -> (reach, Outline), with area pi * size^2


def polygon(corners: np.ndarray, size: float) -> tuple[float, Outline]:
    """The outline of (n, 2) corners, scaled to the area pi * size^2."""
    x, y = corners.T
    area = 0.5 * abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
    corners = corners * (size * np.sqrt(np.pi / area))

    def outline(u: Field, v: Field) -> Field:
        squared, inside = np.full(u.shape, np.inf), np.zeros(u.shape, bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
            ex, ey, du, dv = bx - ax, by - ay, u - ax, v - ay
            along = np.clip((du * ex + dv * ey) / (ex * ex + ey * ey), 0, 1)
            squared = np.minimum(squared, (du - along * ex) ** 2 + (dv - along * ey) ** 2)
            inside ^= ((ay <= v) != (by <= v)) & ((du * ey < dv * ex) == (ey > 0))  # edges right of the pixel
        return np.where(inside, -1, 1) * np.sqrt(squared)

    return float(np.sqrt((corners**2).sum(1).max())), outline


def star_corners(radii: list[float], start: float = 0.0) -> np.ndarray:
    """(n, 2) corners at equal angles and the given distances from the center."""
    angles = start + 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.array(radii)[:, None]


def ball(rng: Generator, size: float) -> tuple[float, Outline]:
    return size, lambda u, v: np.hypot(u, v) - size


def square(rng: Generator, size: float) -> tuple[float, Outline]:
    return polygon(star_corners([1.0] * 4, np.pi / 4) * [1, uniform(rng, 0.8, 1)], size)


def triangle(rng: Generator, size: float) -> tuple[float, Outline]:
    return polygon(star_corners([1.0] * 3) * [1, uniform(rng, 0.75, 1.2)], size)


def star(rng: Generator, size: float) -> tuple[float, Outline]:
    return polygon(star_corners([1, uniform(rng, 0.4, 0.5)] * 5), size)


def ring(rng: Generator, size: float) -> tuple[float, Outline]:
    hole = uniform(rng, 0.42, 0.65)
    outer = size / np.sqrt(1 - hole**2)
    return outer, lambda u, v: np.abs(np.hypot(u, v) - outer * (1 + hole) / 2) - outer * (1 - hole) / 2


def cross(rng: Generator, size: float) -> tuple[float, Outline]:
    arm = uniform(rng, 0.24, 0.36)
    quarter = np.array([[1, -arm], [1, arm], [arm, arm]])
    return polygon(np.concatenate([quarter @ [[c, s], [-s, c]] for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]), size)


def blob(rng: Generator, size: float) -> tuple[float, Outline]:
    """Clutter: a closed curve without corners, too uneven to look like a ball."""
    angles = 2 * np.pi * np.arange(40) / 40
    radii = 1 + sum(uniform(rng, 0.15, 0.35) * np.sin(k * angles + uniform(rng, 0, 7)) for k in (2, 3))
    return polygon(star_corners(list(np.maximum(radii, 0.2))), size)


def bar(rng: Generator, size: float) -> tuple[float, Outline]:
    """Clutter: a plank."""
    return polygon(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [uniform(rng, 4, 10), 1], size)


# Textures: identify a class nearly as well as its outline


def shading(local: Local, rng: Generator) -> Field:
    """A sphere under the scene's light."""
    u, v = local.u / local.shape.size, local.v / local.shape.size
    c, s = np.cos(local.shape.angle), np.sin(local.shape.angle)
    height = np.sqrt(np.maximum(1 - u * u - v * v, 0))
    facing = (u * c - v * s) * local.light[0] + (u * s + v * c) * local.light[1] + height * local.light[2]
    return 0.85 * np.maximum(facing, 0) + 0.5 * np.maximum(facing, 0) ** uniform(rng, 10, 40)


def checks(local: Local, rng: Generator) -> Field:
    period = max(local.shape.size * uniform(rng, 0.6, 1.1), 6.0)
    a, b = (wave(w / period + rng.random(), 1.2 / period) for w in (local.u, local.v))
    return a + b - 2 * a * b


def stripes(local: Local, rng: Generator) -> Field:
    period = max(local.shape.size * uniform(rng, 0.35, 0.8), 5.0)
    angle = pick(rng, (0.0, np.pi / 3, np.pi / 2))
    return wave((local.u * np.cos(angle) + local.v * np.sin(angle)) / period + rng.random(), 1.2 / period)


def facets(local: Local, rng: Generator) -> Field:
    """Half of each tip in shadow, like a compass rose."""
    return wave(np.arctan2(local.v, local.u) * 5 / (2 * np.pi), 0.08)


def segments(local: Local, rng: Generator) -> Field:
    """Alternating segments around the center, like a life buoy."""
    count = pick(rng, (3, 4, 5, 6))
    return wave(np.arctan2(local.v, local.u) * count / (2 * np.pi) + rng.random(), 0.1)


def rim(local: Local, rng: Generator) -> Field:
    """A dark rim around a light core."""
    rim = max(local.shape.size * uniform(rng, 0.1, 0.2), 1.5)
    return np.clip((-local.distance - rim) / 1.5 + 0.5, 0, 1)


def plain(local: Local, rng: Generator) -> Field:
    return np.full(local.u.shape, rng.random())


OBJECTS = {
    "ball": (ball, shading),
    "square": (square, checks),
    "triangle": (triangle, stripes),
    "star": (star, facets),
    "ring": (ring, segments),
    "cross": (cross, rim),
}
TEXTURES = tuple(texture for _, texture in OBJECTS.values())


# Scenes


def scene(rng: Generator) -> list[Shape]:
    """Shapes in painting order: clutter, 1 to 6 objects from large to small, sometimes a plank over them."""
    clutter = [make_clutter(rng, pick(rng, (blob, blob, bar))) for _ in range(int(rng.random() * 5))]
    sizes = sorted((log_uniform(rng, 9, 38) for _ in range(1 + int(rng.random() * 6))), reverse=True)
    objects: list[Shape] = []
    for size in sizes:
        objects += place_object(rng, size, objects)
    front = [make_clutter(rng, bar)] if rng.random() < 0.2 else []
    return clutter + objects + front


def make_clutter(rng: Generator, kind: Callable) -> Shape:
    size = log_uniform(rng, 5, 22) if kind is blob else log_uniform(rng, 6, 14)
    reach, outline = kind(rng, size)
    texture = pick(rng, TEXTURES) if rng.random() < 0.3 else plain
    return Shape(0, uniform(rng, 0, SIZE), uniform(rng, 0, SIZE), uniform(rng, 0, 7), size, reach, outline, texture)


def place_object(rng: Generator, size: float, others: list[Shape]) -> list[Shape]:
    """One object of a random class that leaves the `others` visible; [] if no place was found."""
    label = 1 + int(rng.random() * len(OBJECTS))
    outline, texture = tuple(OBJECTS.values())[label - 1]
    reach, outline = outline(rng, size)
    odd = rng.random()
    texture = plain if odd < 0.1 else pick(rng, TEXTURES) if odd < 0.16 else texture
    margin = min(0.7 * size, SIZE / 3)
    for _ in range(10):
        x, y = (uniform(rng, margin, SIZE - margin) for _ in range(2))
        if all(np.hypot(x - other.x, y - other.y) > 0.9 * other.size + 0.3 * size for other in others):
            return [Shape(label, x, y, uniform(rng, 0, 2 * np.pi), size, reach, outline, texture)]
    return []


def paint(image: np.ndarray, mask: np.ndarray, shape: Shape, light: np.ndarray, rng: Generator) -> None:
    """Paint a shape and its shadow over `image` (SIZE, SIZE, 3) 0..1 and `mask`, both in place."""
    drop = uniform(rng, 1, 5)  # pixels between the shape and its shadow
    first, second = shape_colors(rng, shape, image)
    contrast, darkness = uniform(rng, 0.6, 1), uniform(rng, 0.1, 0.5)
    box = bounding_box(shape, margin=8)
    c, s = np.cos(shape.angle), np.sin(shape.angle)

    def local(x: Field, y: Field) -> tuple[Field, Field]:
        dx, dy = x - shape.x, y - shape.y
        return dx * c + dy * s, dy * c - dx * s

    shadow = shape.outline(*local(X[box] + drop * light[0], Y[box] + drop * light[1])) / (1 + drop)
    image[box] *= 1 - darkness * np.clip(0.5 - shadow, 0, 1)[..., None]
    u, v = local(X[box], Y[box])
    distance = shape.outline(u, v)
    coverage = np.clip(0.5 - distance, 0, 1)
    blend = 0.5 + contrast * (shape.texture(Local(u, v, distance, shape, light), rng) - 0.5)
    image[box] = mix(image[box], mix(first, second, blend), coverage)
    mask[box][coverage > 0] = IGNORE_INDEX if shape.label else 0
    mask[box][coverage == 1] = shape.label


def bounding_box(shape: Shape, margin: float) -> tuple[slice, slice]:
    """Rows and columns of the image that contain a shape and `margin` pixels around it."""
    reach = shape.reach + margin
    ends = (np.clip([center - reach, center + reach + 1], 0, SIZE).astype(int) for center in (shape.y, shape.x))
    rows, columns = (slice(int(low), int(high)) for low, high in ends)
    return rows, columns


def shape_colors(rng: Generator, shape: Shape, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A dark and a light color that differ from each other and from what is already painted there."""
    behind = image[min(int(shape.y), SIZE - 1), min(int(shape.x), SIZE - 1)]
    for _ in range(20):
        first = random_color(rng, (0.45, 1) if shape.label else (0, 0.6), (0.5, 1), class_hue(rng, shape.label))
        second = first * uniform(rng, 0.15, 0.5) if rng.random() < 0.7 else random_color(rng, (0, 0.5), (0.15, 1))
        if np.abs(first - second).max() > 0.4 and np.abs((first + second) / 2 - behind).max() > 0.25:
            break
    return (first, second) if first.sum() < second.sum() else (second, first)


def class_hue(rng: Generator, label: int) -> float | None:
    """Most objects have a hue near their class's; the ranges of adjacent classes overlap. None: any hue."""
    if label == 0 or rng.random() < 0.1:
        return None
    return (label + 0.75 * (rng.random() + rng.random() - 1)) / len(OBJECTS)
