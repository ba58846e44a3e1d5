"""Scenes of coloured shapes: sampled from a prompt's metadata, and drawn.

A scene is a light tinted background with one to four objects that neither touch each other nor the border. Drawing
is analytic: the coverage of a pixel is its signed distance to the outline, clipped to half a pixel on either side.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from burnish.evaluation import relations

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (214, 48, 49),
    "yellow": (243, 190, 22),
    "green": (39, 153, 73),
    "blue": (41, 98, 214),
    "purple": (142, 68, 190),
    "black": (38, 38, 42),
}
GAP = 2.0  # pixels between the boxes of two objects, and half of it to the border


@dataclass(frozen=True)
class Thing:
    """One object: `x`, `y` is the centre of its box and `size` the box's side, all in pixels."""

    shape: str
    color: str
    x: float
    y: float
    size: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        half = self.size / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: tuple[float, float, float]  # in [0, 1]


def sample_scene(metadata: dict, rng: np.random.Generator) -> Scene:
    """A random scene that satisfies a prompt's `include` clauses and holds nothing else.

    What a clause leaves open (colour, size, place) is drawn at random. Raises ValueError when the clauses ask for
    more objects than fit.
    """
    wanted = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    largest = {1: 15, 2: 15, 3: 12, 4: 10.5}.get(len(wanted), 8)
    tint = rng.uniform(0.86, 0.97, 3)
    for _ in range(1000):
        things: list[Thing] = []
        for clause in wanted:
            color = clause.get("color") or str(rng.choice(list(COLORS)))
            size = float(rng.uniform(8, largest))
            for _ in range(20):
                x, y = rng.uniform(size / 2 + GAP / 2, SIZE - size / 2 - GAP / 2, 2)
                thing = Thing(clause["class"], color, float(x), float(y), size)
                if all(_apart(thing, other) for other in things):
                    things.append(thing)
                    break
        if len(things) == len(wanted) and _in_relation(things, metadata["include"]):
            return Scene(tuple(things), (float(tint[0]), float(tint[1]), float(tint[2])))
    raise ValueError(f"no scene of {SIZE}x{SIZE} pixels satisfies {metadata['include']}: ask for fewer objects")


def _apart(one: Thing, other: Thing) -> bool:
    reach = (one.size + other.size) / 2 + GAP
    return abs(one.x - other.x) >= reach or abs(one.y - other.y) >= reach


def _in_relation(things: list[Thing], clauses: list[dict]) -> bool:
    first = np.cumsum([0] + [clause["count"] for clause in clauses])
    for index, clause in enumerate(clauses):
        if "position" in clause:
            relation, target = clause["position"]
            for one in things[first[index] : first[index + 1]]:
                for other in things[first[target] : first[target + 1]]:
                    if relation not in relations(one.box, other.box):
                        return False
    return True


def render(scenes: list[Scene]) -> Float[Tensor, "batch 3 height width"]:
    """Draw scenes as images in [0, 1], anti-aliased over one pixel."""
    centre = np.arange(SIZE, dtype=np.float32) + 0.5
    image = np.empty((len(scenes), 3, SIZE, SIZE), np.float32)
    for index, scene in enumerate(scenes):
        image[index] = np.asarray(scene.background, np.float32)[:, None, None]
        for thing in scene.things:
            x, y = (centre - thing.x)[None, :], (centre - thing.y)[:, None]
            alpha = np.clip(0.5 - outline_distance(thing.shape, x, y, thing.size / 2), 0, 1)
            color = np.asarray(COLORS[thing.color], np.float32)[:, None, None] / 255
            image[index] += alpha * (color - image[index])
    return torch.from_numpy(image)


def outline_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to the outline of a shape inscribed in a box of half-side `radius`; < 0 inside."""
    if shape == "circle":
        return np.sqrt(x**2 + y**2) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.92 * radius
    if shape == "cross":
        bar = 0.34 * radius
        return np.minimum(
            np.maximum(abs(x) - radius, abs(y) - bar),
            np.maximum(abs(x) - bar, abs(y) - radius),
        )
    if shape == "triangle":  # apex up, two slanted sides of slope 2
        slanted = (2 * abs(x) - (y + radius)) / np.sqrt(5)
        return np.maximum(slanted, y - radius)
    raise ValueError(f"unknown shape {shape!r}: it must be one of {', '.join(SHAPES)}")
