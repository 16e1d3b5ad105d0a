"""Boxes and balls on noise, with labels for the tasks of Ultralytics."""

from pathlib import Path

import numpy as np

# Keypoints of a person, as in COCO, here of a box.
POINTS = 17


def draw(folder, task, *, count=24, size=96, classes=2):
    """Write images and labels to a folder, of two of so many classes; return what Ultralytics takes as ``data``."""
    import cv2

    folder, random = Path(folder), np.random.default_rng(0)
    for i in range(count):
        image, lines = (random.random((size, size, 3)) * 60).astype("uint8"), []
        kinds = random.integers(0, 2, 1 if task == "classify" else 2)
        for kind in kinds:
            (x, y), half = random.integers(20, size - 20, 2).tolist(), int(random.integers(8, 18))
            corners = [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
            if kind:
                cv2.circle(image, (x, y), half, (255, 255, 255), -1)
            else:
                cv2.rectangle(image, corners[0], corners[2], (0, 200, 255), -1)
            lines.append(_label(task, kind, np.array([x, y]) / size, 2 * half / size, np.array(corners) / size))
        where = folder / "images"
        if task == "classify":
            where = folder / ("train" if i % 2 else "val") / ("box", "ball")[kinds[0]]
        where.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(where / f"{i}.png"), image)
        (folder / "labels").mkdir(exist_ok=True)
        (folder / f"labels/{i}.txt").write_text("\n".join(lines))
    if task == "classify":
        return str(folder)
    names = {i: f"class {i}" for i in range(classes)}
    points = f"kpt_shape: [{POINTS}, 3]\n" if task == "pose" else ""
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {names}\n{points}")
    return str(folder / "data.yaml")


def _label(task, kind, center, side, corners):
    numbers = [*center, side, side]
    if task in ("segment", "obb"):
        numbers = corners.flatten()
    elif task == "pose":
        numbers += [number for i in range(POINTS) for number in (*corners[i % 4], 2)]
    return " ".join([str(kind), *(f"{number:.4f}" for number in numbers)])
