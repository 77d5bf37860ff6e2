"""Scenes of frames in files: a floor seen from above, as `lightspan.datamodules.loading.frame_files` reads it."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WIDE, HIGH = 32, 24  # of a picture; its depth map has half of each side
LENS = np.array([[30, 0, 15], [0, 28, 12], [0, 0, 1.0]])
HALF = np.array([[15, 0, 7.25], [0, 14, 5.75], [0, 0, 1.0]])  # the middle of its first pixel is at 0.5 of the other's


def poses(count: int) -> list[np.ndarray]:
    """Of cameras one to two metres over the floor z = -3, that look down, each turned a little; camera to scene."""
    found = []
    for number in range(count):
        cos, sin = np.cos(0.3 * number), np.sin(0.3 * number)
        pose = np.eye(4)
        pose[:3, :3] = np.array([[cos, sin, 0], [sin, -cos, 0], [0, 0, -1]])  # columns: right, down, ahead
        pose[:3, 3] = [0.2 * number, 0.1, -2 + 0.1 * number]
        found.append(pose)
    return found


def written(folder: Path, kind: str, count: int = 4, seed: int = 0) -> Path:
    """A scene that sees nothing but the floor, with a colour that depends on the frame."""
    folder.mkdir(parents=True)
    listed = []
    for name in ("color", "depth", "pose", "intrinsic"):
        (folder / name).mkdir()
    for number, pose in enumerate(poses(count)):
        Image.new("RGB", (WIDE, HIGH), (20 * number, 100, seed)).save(folder / "color" / f"{number}.png")
        z = np.full((HIGH // 2, WIDE // 2), round(1000 * (pose[2, 3] + 3)), np.uint16)
        z[0, 0] = 0
        Image.fromarray(z).save(folder / "depth" / f"{number}.png")
        np.savetxt(folder / "pose" / f"{number}.txt", pose)
        matrix = pose @ np.diag([1.0, -1, -1, 1])
        listed.append({
            "file_path": f"color/{number}.png", "depth_file_path": f"depth/{number}.png",
            "transform_matrix": matrix.tolist(),
        })  # fmt: skip
    if kind == "exported":
        for name, lens in (("color", LENS), ("depth", HALF)):
            whole = np.eye(4)
            whole[:3, :3] = lens
            np.savetxt(folder / "intrinsic" / f"intrinsic_{name}.txt", whole)
    else:
        lens = {"fl_x": 30, "fl_y": 28, "cx": 15.5, "cy": 12.5, "w": WIDE, "h": HIGH}
        (folder / "transforms.json").write_text(json.dumps(lens | {"frames": listed}))
    return folder
