"""Lists of image files that another program made, or a person: which image each line means."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..files import spellings

ABSOLUTE = re.compile("/|[A-Za-z]:/")


class ImageIndex:
    """Finds images by what a list calls them.

    A path in a list is relative to the list's folder. It may also begin with the name of that
    folder, or with folders above it. Of an absolute path, which may be that of another machine,
    first folders are left out until one is found, but not all. A name without folders will do where
    one image alone has it, with its suffix or without, in any case. Blanks and quotes around a
    path, and backslashes in it, do no harm.

    Args:
        paths: of the images, absolute.
        root: the folder of the list.
    """

    def __init__(self, paths: Sequence[str], root: Path):
        self.root = root
        names = [os.path.basename(path) for path in paths]  # noqa: PTH119 of every image: speed
        stems = [name.rpartition(".")[0] or name for name in names]
        self._images = {path: path for path in paths}
        for kind in (names, stems):
            for spelt in (kind, [name.casefold() for name in kind]):
                self._images = _unique(spelt, paths) | self._images

    def find(self, listed: str) -> str | None:
        """The path of the image that a line means; None where there is none, or more than one."""
        *_, plain = spelt = spellings(listed)
        below = f"/{plain}".rpartition(f"/{self.root.name}/")[2]
        places = (str(self.root / path) for path in (*spelt, below))
        readings = [*places, plain, plain.casefold()]
        if ABSOLUTE.match(plain):
            parts = plain.split("/")
            readings += (str(self.root.joinpath(*parts[at:])) for at in range(1, len(parts) - 1))
        return next((self._images[each] for each in readings if each in self._images), None)


def _unique(names: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """The path of each name that one image alone has."""
    counts = Counter(names)
    return {name: path for name, path in zip(names, paths, strict=True) if counts[name] == 1}
