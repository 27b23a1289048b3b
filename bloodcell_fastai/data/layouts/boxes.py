"""Images of many cells with boxes, which are refused."""

import re
from pathlib import Path

from ...errors import DataError
from .files import Files, LabelSource


def refuse_boxes(files: Files, source: LabelSource) -> None:
    """Images of many cells with a box around each.

    Raises:
        BloodcellError: there are files of boxes for them.
    """
    stems = {path.stem for path in files.images}
    boxes = [path for path in files.others if path.stem in stems and _holds_boxes(path)]
    if boxes:
        raise DataError(
            f"{files.root} holds images of many cells with boxes around them, such as "
            f"{boxes[0].relative_to(files.root)}, and no class for an image.",
            "Images of one white cell each are needed: cut the boxes out, into a folder per class.",
        )


def _holds_boxes(path: Path) -> bool:
    """Whether a file is of Pascal VOC, LabelMe or YOLO."""
    if path.suffix.lower() not in (".xml", ".json", ".txt"):
        return False
    with path.open("rb") as file:
        start = file.read(4096)
    lines = start.decode("utf-8", "replace").splitlines()[:1]
    yolo = all(re.fullmatch(r"\d+( [\d.]+){4}\s*", line) for line in lines)
    return b"<bndbox>" in start or b'"shapes"' in start or (path.suffix == ".txt" and yolo)
