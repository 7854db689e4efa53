"""Boxes of the demo in the Something-Else form, as a hand and object detector would give them: not perfect.

A box is missing where the thing is out of the frame or hidden under a cover, and now and then for no reason;
the others are off by a few per cent of their size.
"""

from typing import Any

import cv2
import numpy as np

from mmkd.data_manifests.demo.draw import Draw
from mmkd.data_manifests.demo.plan import ClipPlan, DemoOptions
from mmkd.data_manifests.demo.scene import Layer, Scene, outline_at
from mmkd.data_manifests.demo.sprites import Float32Array

MISSED = 0.06
"""Share of boxes that the detector misses."""
JITTER = 0.05
"""Largest error of an edge, as a share of the box's size."""
HIDDEN = 0.7
"""Share of a thing under the cover from which on it counts as hidden."""
LEAST_VISIBLE = 0.2
"""Share of a thing that must be inside the frame."""
LEAST_AREA_PX = 6.0
"""Smallest area of a box, in square pixels."""

Box = tuple[float, float, float, float]


def _shared_area(first: Float32Array, second: Float32Array) -> float:
    """Return the area that the convex hulls of two outlines share, in square pixels."""
    area, _ = cv2.intersectConvexConvex(cv2.convexHull(first), cv2.convexHull(second))
    return float(area)


def visible_box(scene: Scene, layer: Layer, frame: int) -> Box | None:
    """Return the true box (x1, y1, x2, y2), in pixels and cut at the frame's edge, or None where unseen."""
    outline = outline_at(scene, layer, frame)
    size = np.array([scene.width, scene.height], np.float32)
    inside = outline[((outline >= 0) & (outline <= size)).all(axis=1)]
    edge = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32) * size
    area = _shared_area(outline, edge)
    least = LEAST_VISIBLE if layer.name != "hand" else 0.02  # most of an arm is always out of the frame
    if not len(inside) or area < max(least * cv2.contourArea(cv2.convexHull(outline)), LEAST_AREA_PX):
        return None
    for other in scene.layers:
        hides = layer.name == "0000" and other.name == "0001"
        if hides and _shared_area(outline, outline_at(scene, other, frame)) > HIDDEN * area:
            return None
    (x1, y1), (x2, y2) = inside.min(axis=0), inside.max(axis=0)
    return float(x1), float(y1), float(x2), float(y2)


def _detected(box: Box, scene: Scene, draw: Draw) -> Box:
    """Return the box with a detector's error, still inside the frame."""
    width, height = box[2] - box[0], box[3] - box[1]
    spans = (width, height, width, height)
    limits = (scene.width, scene.height, scene.width, scene.height)
    moved = [
        min(max(edge + draw.uniform(-JITTER, JITTER) * span, 0.0), float(limit))
        for edge, span, limit in zip(box, spans, limits, strict=True)
    ]
    return moved[0], moved[1], moved[2], moved[3]


def box_annotations(plan: ClipPlan, scene: Scene, options: DemoOptions) -> list[dict[str, Any]]:
    """Return the annotation of every frame of a clip, as Something-Else publishes it."""
    draw = Draw(options.seed, plan.number, 3)
    rows = []
    for frame in range(scene.frames):
        labels = []
        for layer in scene.layers:
            box = visible_box(scene, layer, frame) if layer.name else None
            missed = draw.chance(MISSED)
            if box is None or missed:
                continue
            x1, y1, x2, y2 = (round(edge, 3) for edge in _detected(box, scene, draw))
            thing = "hand" if layer.name == "hand" else str(int(layer.name))
            labels.append(
                {
                    "box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2},
                    "gt_annotation": f"object {thing}",
                    "category": layer.category,
                    "standard_category": layer.name,
                }
            )
        rows.append(
            {
                "name": f"{plan.clip_id}/{frame + 1:04d}.jpg",
                "gt_placeholders": plan.placeholders(),
                "nr_instances": len(labels),
                "labels": labels,
            }
        )
    return rows
