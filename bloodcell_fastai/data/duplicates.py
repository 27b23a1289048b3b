"""Which photograph each image is a copy of, found from the pixels.

Copies that were rotated, sheared, shifted, mirrored and shrunk have different hashes but the same
local features. The steps, each from the literature:

1. **Features.** SIFT keypoints of the green channel (Lowe, IJCV 2004), the channel a blood stain
   absorbs most, with RootSIFT descriptors (Arandjelović and Zisserman, CVPR 2012). Black corners
   left by an augmentation contribute none.
2. **Candidates.** Descriptors become visual words and images vote for images with the same rare
   words (Sivic and Zisserman, ICCV 2003). The words are the cells of two small codebooks, an
   inverted multi-index (Babenko and Lempitsky, CVPR 2012). A mirror image is a re-ordering of the
   descriptor, so mirrored copies cost a second search and no second detection.
3. **Verification.** The few best candidates are compared: mutually nearest descriptors, an affine
   map by RANSAC (Fischler and Bolles, CACM 1981), and the correlation of the two images once one
   is warped onto the other. Features can agree by chance or because of a printed scale bar; whole
   images cannot.
4. **Groups.** Verified links join images. Weak links join two groups only if they reach two images
   of each, so that one wrong link cannot join two photographs.

Labels are not used. The result depends neither on the number of workers, nor on the names and the
order of the files.

**Cost.** Reading and detection take most of the time (about 20 ms of one core an image) and grow
linearly, as do verification and memory (about 50 kB an image). Only the vote is quadratic: 1 ms an
image at 10,000 images. A million would need features on disk and an index such as FAISS.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from lzma import LZMAError
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from ..errors import BloodcellError, DataError
from ..files import atomic_path, read_table, require_columns
from .images import open_image
from .listed import ImageIndex

Progress = Callable[[int, int, str], None]
_Parallel = Callable[[Callable, Sequence, str], Iterator]
"""Applies a function to tasks, in threads; yields the results in their order."""

COLUMNS = ["path", "original", "photo", "inliers", "margin"]
KAGGLE_TABLE = Path(__file__).with_name("kaggle_photos.csv.xz")

MAX_IMAGES = 200_000  # 10 GB of features, and hours for the vote, which is quadratic

# Images are compared at this length of their longer side, in pixels. It is the size of Kaggle's
# copies; larger images are shrunk to it.
_SIDE = 320
_FEATURES = 250
_DARK = 24  # a pixel is black when no channel exceeds this; JPEG leaves black corners a little grey
_RIM = 13  # features nearer to a black corner than half of this, in pixels, describe its edge
_DESCRIPTOR_SCALE = 512  # RootSIFT values, below 0.5 in practice, are kept as bytes

# On the real set, images of different photographs never had more than 8 inliers, and two
# photographs that overlap by a fifth still correlate at 0.89.
_MIN_INLIERS = 10
_STRONG_INLIERS = 25
_MIN_AGREEMENT = 0.8
_MIN_COVER = 0.1
# An augmented copy shows nothing that its original does not: real copies lie at least 98.9 %
# inside it, while another photograph of the field is usually shifted.
_COPY_COVER = 0.97
_RANSAC_PIXELS = 3.0

_CANDIDATES = 8
_MANY_CANDIDATES = 60  # where the first ones do not explain an image, or overlaps are small
_ROUNDS = 4


class _Features(NamedTuple):
    """What is kept of an image: about 50 kB."""

    points: np.ndarray  # (n, 2) float32, x and y in pixels of the image shrunk to _SIDE
    descriptors: np.ndarray  # (n, 128) uint8, RootSIFT times _DESCRIPTOR_SCALE
    small: np.ndarray  # (h, w) uint8, green channel at half of that size; 0 in black corners
    width: int  # of the shrunk image
    scale: float  # shrunk size over file size


class _Fit(NamedTuple):
    """How image a lies on image b."""

    inliers: int  # matches that agree on one affine map; 0 where the map is absurd
    agreement: float  # correlation of the images where they overlap, -1 to 1
    cover: float  # fraction of a, without its black corners, that lies inside b
    points_a: np.ndarray  # (inliers, 2) float32
    points_b: np.ndarray  # (inliers, 2) float32

    @property
    def verified(self) -> bool:
        return (
            self.inliers >= _MIN_INLIERS
            and self.agreement >= _MIN_AGREEMENT
            and self.cover >= _MIN_COVER
        )


_NO_FIT = _Fit(0, 0.0, 0.0, np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32))


class _Link(NamedTuple):
    """One comparison: image a with image b."""

    a: int
    b: int
    inliers: int
    verified: bool


# --- public functions ---------------------------------------------------------------------------


def find_photos(
    paths: Sequence[Path],
    originals: Sequence[Path] = (),
    workers: int | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Find the photograph behind every image.

    Args:
        paths: image files.
        originals: the photographs the images may be copies of, where there are any.
        workers: threads; all cores when None. The result does not depend on it.
        progress: called from this thread with (done, total, stage), for a progress bar.

    Returns:
        One row per path, in the given order, with these columns.

        - ``path``, as given;
        - ``original``, name (stem) of the original; ``missing-0001`` and so on where none of the
          originals fits; ``photo-0001`` and so on where no originals were given;
        - ``photo``, the field, which is the unit of independence: photographs that overlap have
          the same one, named after the first of them;
        - ``inliers``, features that agree with the original, or with the closest other copy;
        - ``margin``, inliers over those of the next best original, or of the closest image of
          another group. Both are 0 where an image stands alone.

        An unreadable file stands alone. Byte-identical files belong together.

    Raises:
        BloodcellError: there are more than 200,000 images, which would take most of a day.

    Examples:
        >>> from bloodcell_fastai import find_photos, make_demo, open_dataset
        >>> dataset = open_dataset(make_demo("copies", photos_per_class=2, copies=3))
        >>> found = find_photos(dataset.table.path, dataset.originals)
        >>> list(found.columns)
        ['path', 'original', 'photo', 'inliers', 'margin']
        >>> len(found), found.original.nunique()
        (28, 8)
    """
    if len(paths) > MAX_IMAGES:
        raise BloodcellError(
            f"{len(paths):,} images are too many to compare with one another (limit "
            f"{MAX_IMAGES:,}).",
            "Say which photograph each is of in photos.csv (path, photo) in the data set's folder.",
        )
    with _threads(workers, progress) as parallel:
        images = _Collection([Path(path) for path in paths], parallel, "reading images")
        if originals:
            columns = _against_originals(images, [Path(path) for path in originals], parallel)
        else:
            columns = _among_themselves(images, parallel)
    found = pd.DataFrame(columns).iloc[images.content].reset_index(drop=True)
    return found.assign(path=list(paths))[COLUMNS]


def known_photos(paths: Sequence[str | Path], table: Path = KAGGLE_TABLE) -> pd.DataFrame:
    """Look images up in a table of known photographs, by the hash of their bytes.

    Returns the rows of :func:`find_photos` for those paths that the table knows, perhaps none.

    Raises:
        BloodcellError: the file is no such table.
    """
    columns, texts = ["digest", *COLUMNS[1:]], dict.fromkeys(["digest", "original", "photo"], str)
    try:  # a photograph may be "NA"
        known = pd.read_csv(table, usecols=columns, dtype=texts, keep_default_na=False)
    except (ValueError, LZMAError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{table} is no table of known photographs: {reason}.", "Make it with bloodcell audit."
        ) from None
    digests = pd.DataFrame({"path": list(paths), "digest": [digest(path) for path in paths]})
    return digests.merge(known, on="digest", how="inner")[COLUMNS]


def write_known_photos(found: pd.DataFrame, table: Path = KAGGLE_TABLE) -> None:
    """Write a result of :func:`find_photos` as a table for :func:`known_photos`."""
    rows = found.assign(digest=[digest(path) for path in found["path"]])
    rows = rows[rows["digest"] != ""].drop_duplicates("digest").sort_values("digest")
    with atomic_path(table) as part:
        rows[["digest", *COLUMNS[1:]]].to_csv(part, index=False, compression="xz")


def with_photos(table: pd.DataFrame, root: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The image table with ``photo`` filled in where the photographs are known already.

    They are if ``root``, the folder of the data set, holds a ``photos.csv`` (columns ``path`` and
    ``photo``), or if the images are those of Kaggle's set. ``photo`` is empty where the photograph
    is not known.

    How ``photos.csv`` may call an image: see :class:`~bloodcell_fastai.data.listed.ImageIndex`.

    Returns:
        The table, and a warning if ``photos.csv`` does not tell the photograph of every image.

    Raises:
        BloodcellError: that file is no such table, or has two lines for one image.
    """
    listed = Path(root) / "photos.csv"
    warnings: tuple[str, ...] = ()
    if listed.is_file():
        photo_of, warnings = _read_photos(listed, table["path"])
    else:
        found = known_photos(table["path"])
        photo_of = dict(zip(found["path"], found["photo"], strict=True))
    return table.assign(photo=[photo_of.get(path, "") for path in table["path"]]), warnings


def _read_photos(listed: Path, paths: pd.Series) -> tuple[dict[str, str], tuple[str, ...]]:
    """The photograph of each image that ``photos.csv`` knows; a warning if these are not all."""
    hint = "Make it anew with bloodcell audit, or remove it."
    table = read_table(listed, [], hint=hint).rename(columns=str.strip)
    require_columns(listed, table, ["path", "photo"], hint)
    images = ImageIndex(list(paths), listed.parent)
    line_of: dict[str, str] = {}
    photo_of, unmatched = {}, []
    for line, photo in zip(table["path"], table["photo"].str.strip(), strict=True):
        path = images.find(line)
        if first := line_of.get(path or line):
            raise DataError(f"{listed} holds a path twice: {first!r} and {line!r}.", hint)
        line_of[path or line] = line
        if path is None:
            unmatched.append(line)
        elif photo:
            photo_of[path] = photo
    if len(photo_of) == len(paths):
        return photo_of, ()
    gaps = f"{listed} tells the photograph of {len(photo_of):,} of {len(paths):,} images"
    if unmatched:
        gaps += f"; {len(unmatched):,} of its lines match no image, such as {unmatched[0]!r}"
    hint = "Its paths are relative to its folder; bloodcell audit makes it anew."
    return photo_of, (f"{gaps}. {hint}",)


def match_pair(a: str | Path, b: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Points that show the same thing in two images, one perhaps mirrored: two arrays (n, 2) of
    float32, x and y in pixels of the files; n is 0 where the images do not match."""
    fit, mirrored, first, second = _best_fit(a, b)
    points = _mirror_points(fit.points_a, first.width) if mirrored else fit.points_a
    return points / first.scale, fit.points_b / second.scale


def overlap(a: str | Path, b: str | Path) -> float:
    """Fraction of image a, without its black corners, that image b shows too, 0 to 1."""
    return _best_fit(a, b)[0].cover


# --- with originals, and without ----------------------------------------------------------------


def _against_originals(images: "_Collection", originals: list[Path], parallel: _Parallel) -> dict:
    """Assign each image to an original; group among themselves those that none explains."""
    photos = _Collection(originals, parallel, "reading originals")
    unique_names = _unique_names(originals)
    photo_names = [unique_names[first] for first in photos.first]
    index = _Index(photos.features, parallel)
    best, inliers, margin = _assign(images.features, photos.features, index, parallel)

    # Originals and unexplained images are linked in one go: that gives the fields, the groups of
    # the missing originals, and which of those belong to a field.
    stray = np.flatnonzero(best < 0)
    together = photos.features + [images.features[i] for i in stray]
    # Photographs of one field may overlap in no more than a strip, hence many candidates.
    links = _link(together, _MANY_CANDIDATES, parallel)
    n = len(photos.features)
    fields = _join_originals(_group(len(together), links), links, n)
    stray_links = [
        _Link(link.a - n, link.b - n, link.inliers, link.verified)
        for link in links
        if link.a >= n and link.b >= n
    ]
    stray_groups = _group(len(stray), stray_links)
    inliers[stray], margin[stray] = _support(stray_groups, stray_links)

    missing = _number(stray_groups, images.first[stray], "missing")
    names = np.array([*photo_names, *missing], object)
    name_of = best.copy()
    name_of[stray] = np.arange(n, len(names))
    field_names: dict[int, str] = {}
    # An original gives the field its name before a missing one does.
    for k in [*np.argsort(photo_names), *range(n, len(names))]:
        field_names.setdefault(fields[k], names[k])
    photo = [field_names[field] for field in fields[name_of]]
    return {"original": names[name_of], "photo": photo, "inliers": inliers, "margin": margin}


def _among_themselves(images: "_Collection", parallel: _Parallel) -> dict:
    """Group images by their links alone."""
    links = _link(images.features, _CANDIDATES, parallel)
    groups = _group(len(images.features), links)
    inliers, margin = _support(groups, links)
    photo = _number(groups, images.first, "photo")
    return {"original": photo, "photo": photo, "inliers": inliers, "margin": margin}


def _assign(
    images: list[_Features], originals: list[_Features], index: "_Index", parallel: _Parallel
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each image: number of its original (-1 for none), inliers, margin to the runner-up."""
    found = np.zeros((len(images), 3), int)
    found[:, 0] = -1
    choose = partial(_choose, originals=originals)
    for count in (_CANDIDATES, _MANY_CANDIDATES):
        todo = np.flatnonzero(found[:, 0] < 0)
        queries = [images[i] for i in todo]
        candidates = index.candidates(index.words(queries), count, "searching originals")
        tasks = list(zip(queries, candidates, strict=True))
        chosen = list(parallel(choose, tasks, "comparing with originals"))
        found[todo] = np.array(chosen, int).reshape(-1, 3)
    return found[:, 0], found[:, 1], found[:, 2]


def _choose(task: tuple, originals: list[_Features]) -> tuple[int, int, int]:
    """The original of one image among its candidates (-1 for none), with inliers and margin."""
    image, candidates = task
    fits = [(k, _fit(image, originals[k], mirrored)) for k, mirrored in candidates]
    copies = [(k, fit) for k, fit in fits if fit.verified and fit.cover >= _COPY_COVER]
    if not copies:
        return -1, 0, 0
    # Two photographs of one field have nearly as many inliers. Correlation distinguishes them: only
    # the true original, warped onto the copy, matches all of it: what is not covered disagrees.
    most = max(fit.inliers for _, fit in copies)
    likely = [(k, fit) for k, fit in copies if fit.inliers >= most / 2]
    k, fit = max(likely, key=lambda found: found[1].agreement * found[1].cover)
    runner_up = max((other.inliers for j, other in fits if j != k), default=0)
    return k, fit.inliers, fit.inliers - runner_up


# --- links and groups ---------------------------------------------------------------------------


def _link(images: list[_Features], count: int, parallel: _Parallel) -> list[_Link]:
    """Compare each image with its best candidates, then again with those of other groups.

    A photograph can have hundreds of copies, which fill the first list of candidates. The later
    rounds search outside the group found so far, until no groups join. ``count`` is the number of
    candidates of an image in a round.
    """
    index = _Index(images, parallel)
    words = index.words(images)

    def compare(task: tuple[int, int, bool]) -> _Link:
        a, b, mirrored = task
        fit = _fit(images[a], images[b], mirrored)
        return _Link(a, b, fit.inliers, fit.verified)

    links: dict[tuple[int, int, bool], _Link] = {}
    groups = np.arange(len(images))
    for turn in range(1, _ROUNDS + 1):
        stage = f"comparing images, round {turn}"
        found = index.candidates(words, count, f"searching, round {turn}", groups)
        wanted = {(min(a, b), max(a, b), m) for a, best in enumerate(found) for b, m in best}
        tasks = sorted(wanted - links.keys())
        links |= zip(tasks, parallel(compare, tasks, stage), strict=True)
        before, groups = groups, _group(len(images), list(links.values()))
        if len(np.unique(groups)) == len(np.unique(before)):
            break
    return list(links.values())


def _group(count: int, links: list[_Link]) -> np.ndarray:
    """Number the group of each image, (count,) int.

    Strong links join at once. Weak ones join two groups if they reach two images of each (or all
    of a smaller group); in rounds, so that the order of the links does not matter.
    """
    links = [link for link in links if link.verified]
    ends = np.array([(link.a, link.b) for link in links], int).reshape(-1, 2)
    strong = np.array([link.inliers >= _STRONG_INLIERS for link in links], bool)
    groups = _components(count, ends[strong])
    while len(joins := _supported_joins(groups, ends[~strong])):
        groups = _components(groups.max() + 1, joins)[groups]
    return groups


def _join_originals(groups: np.ndarray, links: list[_Link], n: int) -> np.ndarray:
    """Join also the first n images by any verified link: a field has one or two originals, so
    that a second link cannot be required."""
    ends = [(link.a, link.b) for link in links if link.verified and link.b < n]
    joins = groups[np.array(ends, int).reshape(-1, 2)]
    return _components(groups.max() + 1, joins)[groups]


def _supported_joins(groups: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Pairs of groups, (m, 2) int, that enough of the links between images join."""
    sides = groups[ends]
    order = sides.argsort(axis=1, kind="stable")
    columns = np.hstack([np.take_along_axis(each, order, 1) for each in (sides, ends)])
    table = pd.DataFrame(columns, columns=["left", "right", "a", "b"])
    table = table[table["left"] != table["right"]]
    seen = table.groupby(["left", "right"])[["a", "b"]].nunique().reset_index()
    needed = np.minimum(np.bincount(groups), 2)
    enough = (seen["a"] >= needed[seen["left"]]) & (seen["b"] >= needed[seen["right"]])
    return seen.loc[enough, ["left", "right"]].to_numpy()


def _components(count: int, ends: np.ndarray) -> np.ndarray:
    graph = sparse.coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), (count, count))
    return connected_components(graph, directed=False)[1]


def _support(groups: np.ndarray, links: list[_Link]) -> tuple[np.ndarray, np.ndarray]:
    """For each image: inliers of its best link in the group, and that less the best outside."""
    inside, outside = np.zeros((2, len(groups)), int)
    for link in links:
        best = inside if groups[link.a] == groups[link.b] else outside
        for end in (link.a, link.b):
            best[end] = max(best[end], link.inliers)
    return inside, np.where(inside > 0, inside - outside, 0)


def _number(groups: np.ndarray, first: np.ndarray, word: str) -> list[str]:
    """Names such as photo-0001 for groups, in the order their first file was given."""
    ordered = pd.unique(groups[np.argsort(first)])
    numbers = {group: number for number, group in enumerate(ordered, start=1)}
    return [f"{word}-{numbers[group]:04d}" for group in groups]


# --- one image, two images ----------------------------------------------------------------------


def _read(path: str | Path) -> _Features | None:
    """Features of an image file; None where it cannot be read."""
    try:
        return _detect(np.asarray(open_image(path)))
    except OSError:
        return None


def _blank() -> _Features:
    """What stands for a file that is no image: no features."""
    return _detect(np.zeros((1, 1, 3), np.uint8))


def _detect(image: np.ndarray) -> _Features:
    """Features of an image, (h, w, 3) uint8."""
    scale = min(1.0, _SIDE / max(image.shape[:2]))
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    shown = _without_corners(image)
    green = image[:, :, 1]
    # Half of the usual contrast threshold: out-of-focus smears have few sharp features.
    sift = cv2.SIFT.create(nfeatures=_FEATURES, contrastThreshold=0.02)
    inner = cv2.erode(shown, np.ones((_RIM, _RIM), np.uint8))
    keypoints, descriptors = sift.detectAndCompute(green, inner)
    if not keypoints:
        descriptors = np.zeros((0, 128), np.float32)
    total = descriptors.sum(axis=1, keepdims=True)
    root = np.sqrt(descriptors / np.maximum(total, 1)) * _DESCRIPTOR_SCALE
    half = (max(1, green.shape[1] // 2), max(1, green.shape[0] // 2))
    small = cv2.resize(np.maximum(green, 1), half, interpolation=cv2.INTER_AREA)
    small[cv2.resize(shown, half, interpolation=cv2.INTER_AREA) == 0] = 0
    return _Features(
        points=np.array([point.pt for point in keypoints], np.float32).reshape(-1, 2),
        descriptors=np.minimum(np.rint(root), 255).astype(np.uint8),
        small=small,
        width=green.shape[1],
        scale=scale,
    )


def _without_corners(image: np.ndarray) -> np.ndarray:
    """Mask, (h, w) uint8, that is 0 in near-black regions which touch the border."""
    dark = (image.max(axis=2) <= _DARK).astype(np.uint8)
    framed = cv2.copyMakeBorder(dark, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    cv2.floodFill(framed, None, (0, 0), 2)
    return (framed[1:-1, 1:-1] != 2).astype(np.uint8)


# The order in which a descriptor describes the mirror image. It holds 4 rows of 4 cells with 8
# directions each, in the frame of the keypoint's own direction, which mirroring turns along with
# it: rows swap, directions change sign.
_MIRROR_ORDER = np.arange(128).reshape(4, 4, 8)[::-1][:, :, -np.arange(8) % 8].ravel()


def _mirror(image: _Features) -> _Features:
    """Features of the image flipped left to right; a vertical flip is that and half a turn."""
    return image._replace(
        points=_mirror_points(image.points, image.width),
        descriptors=image.descriptors[:, _MIRROR_ORDER],
        small=np.ascontiguousarray(image.small[:, ::-1]),
    )


def _mirror_points(points: np.ndarray, width: int) -> np.ndarray:
    return np.stack([width - 1 - points[:, 0], points[:, 1]], axis=1)


def _fit(a: _Features, b: _Features, mirrored: bool) -> _Fit:
    """Lay image a, or its mirror image, on image b by an affine map."""
    a = _mirror(a) if mirrored else a
    points_a, points_b = _mutual_matches(a, b)
    if len(points_a) < 4:
        return _NO_FIT
    affine, good = cv2.estimateAffine2D(
        points_a, points_b, ransacReprojThreshold=_RANSAC_PIXELS, maxIters=500
    )
    if affine is None or not _plausible(affine[:, :2]):
        return _NO_FIT
    kept = good.ravel() > 0
    points_a, points_b = points_a[kept], points_b[kept]
    # SIFT gives one place several keypoints where its direction is unclear: they count once.
    inliers = min(len(np.unique(np.floor(points), axis=0)) for points in (points_a, points_b))
    if inliers < _MIN_INLIERS:
        return _Fit(inliers, 0.0, 0.0, points_a, points_b)
    return _Fit(inliers, *_agreement(a.small, b.small, affine), points_a, points_b)


def _best_fit(a: str | Path, b: str | Path) -> tuple[_Fit, bool, _Features, _Features]:
    """Verified fit of two files (empty where there is none), whether a had to be mirrored."""
    first, second = (_read(path) or _blank() for path in (a, b))
    fits = [(_fit(first, second, mirrored), mirrored) for mirrored in (False, True)]
    fit, mirrored = max(fits, key=lambda entry: entry[0].inliers)
    return fit if fit.verified else _NO_FIT, mirrored, first, second


def _mutual_matches(a: _Features, b: _Features) -> tuple[np.ndarray, np.ndarray]:
    """Points whose descriptors are each other's nearest."""
    if not len(a.points) or not len(b.points):
        return a.points[:0], b.points[:0]
    similarity = a.descriptors.astype(np.float32) @ b.descriptors.astype(np.float32).T
    to_b, to_a = similarity.argmax(axis=1), similarity.argmax(axis=0)
    mutual = to_a[to_b] == np.arange(len(to_b))
    return a.points[mutual], b.points[to_b[mutual]]


def _plausible(linear: np.ndarray) -> bool:
    """Whether an augmentation could do that: no mirroring, at most threefold, little stretching."""
    large, little = np.linalg.svd(linear, compute_uv=False)
    return bool(np.linalg.det(linear) > 0 and little > 1 / 3 and large < 3 and large < 2 * little)


def _agreement(a: np.ndarray, b: np.ndarray, affine: np.ndarray) -> tuple[float, float]:
    """Correlation of two images once b is warped onto a, and the fraction of a that b covers.

    Correlation is the residual of the warp, freed from differences of brightness and contrast.

    The images are (h, w) uint8, 0 where there is none, of half the size that ``affine`` (2, 3),
    from pixels of a to pixels of b, is for.
    """
    # Centres of the halved pixels lie at 2x + 0.5 of the full grid.
    shift = affine[:, :2] @ [0.5, 0.5] + affine[:, 2] - 0.5
    halved = np.column_stack([affine[:, :2], shift / 2])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(b, halved, a.shape[::-1], flags=flags)
    overlap = ((a > 0) & (warped > 0)).astype(np.uint8)
    area = np.count_nonzero(a)
    # The rim of the overlap is a mixture with what lies outside.
    inner = cv2.erode(overlap, np.ones((3, 3), np.uint8)) > 0
    if not inner.any():
        return 0.0, 0.0
    x, y = (image[inner].astype(np.float32) for image in (a, warped))
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y) + 1e-6)), float(overlap.sum() / area)


# --- candidates ---------------------------------------------------------------------------------


_Words = list[sparse.csr_matrix]
"""Visual words of images, and of their mirror images: matrices (images, words) of 0 and 1."""


class _Index:
    """Finds the images that have rare visual words in common with a query."""

    _SAMPLE = 60_000  # descriptors that the codebooks are learned from
    _CODES = 256  # of each of the two codebooks

    def __init__(self, images: list[_Features], parallel: _Parallel):
        self.parallel = parallel
        self._learn(images)
        words = self.words(images)[0]
        frequency = np.bincount(words.indices, minlength=words.shape[1])
        rarity = np.log(1 + len(images) / np.maximum(frequency, 1)).astype(np.float32) ** 2
        length = np.sqrt(words @ rarity)
        scaled = sparse.diags(1 / np.maximum(length, 1e-6)) @ words @ sparse.diags(rarity)
        self.votes = scaled.T.tocsr().astype(np.float32)  # (words, images)

    def words(self, images: list[_Features]) -> _Words:
        found = list(self.parallel(self._words_of, images, "indexing"))
        return [self._matrix([words[side] for words in found]) for side in (0, 1)]

    def candidates(
        self, words: _Words, count: int, stage: str, groups: np.ndarray | None = None
    ) -> list[list[tuple[int, bool]]]:
        """For each query the best images, best first, each with whether it would be mirrored.

        With ``groups``, (images,) int, the queries are the images themselves, and the candidates
        come from other groups than the query's own.
        """
        images = self.votes.shape[1]

        def best(query: int) -> list[tuple[int, bool]]:
            straight, mirrored = ((part[query] @ self.votes).toarray()[0] for part in words)
            if groups is not None:
                own = groups == groups[query]
                straight[own] = mirrored[own] = 0
            score = np.hstack([straight, mirrored])
            chosen = np.argpartition(-score, min(count, 2 * images) - 1)[:count]
            chosen = chosen[np.argsort(-score[chosen], kind="stable")]
            return [(int(k) % images, bool(k >= images)) for k in chosen if score[k] > 0]

        return list(self.parallel(best, range(words[0].shape[0]), stage))

    def _learn(self, images: list[_Features]) -> None:
        """Two codebooks, each on a half of the principal components of the descriptors."""
        total = sum(len(image.descriptors) for image in images)
        # Images come in the order of their hashes: every k-th is a random sample.
        step = max(1, total // self._SAMPLE)
        sample = np.concatenate(
            [np.zeros((0, 128), np.uint8)] + [image.descriptors for image in images[::step]]
        ).astype(np.float32)
        self.codebooks = []
        if not len(sample):
            return
        self.mean = sample.mean(axis=0)
        _, axes = np.linalg.eigh(np.cov(sample - self.mean, rowvar=False, bias=True))
        axes = axes[:, ::-1].astype(np.float32)  # strongest first
        # Two halves of about equal variance.
        for columns in (np.r_[0:48:4, 3:48:4], np.r_[1:48:4, 2:48:4]):
            projected = (sample - self.mean) @ axes[:, columns]
            codes = min(self._CODES, len(np.unique(projected, axis=0)))
            means = KMeans(codes, n_init=1, max_iter=15, random_state=0).fit(projected)
            self.codebooks.append((axes[:, columns], means.cluster_centers_.astype(np.float32)))

    def _words_of(self, image: _Features) -> list[np.ndarray]:
        """The different words of an image, and of its mirror image."""
        mirrored = image.descriptors[:, _MIRROR_ORDER]
        return [np.unique(self._quantise(each)) for each in (image.descriptors, mirrored)]

    def _matrix(self, words: list[np.ndarray]) -> sparse.csr_matrix:
        ends = np.cumsum([0, *map(len, words)])
        columns = np.concatenate([np.zeros(0, int), *words])
        occurs = np.ones(len(columns), np.float32)
        return sparse.csr_matrix((occurs, columns, ends), (len(words), self._CODES**2))

    def _quantise(self, descriptors: np.ndarray) -> np.ndarray:
        """Word of each descriptor, (n, 128) uint8 -> (n,) int."""
        words = np.zeros(len(descriptors), int)
        for axes, codes in self.codebooks:
            projected = (descriptors.astype(np.float32) - self.mean) @ axes
            nearness = projected @ codes.T - (codes**2).sum(axis=1) / 2
            words = words * self._CODES + nearness.argmax(axis=1)
        return words


# --- files and threads --------------------------------------------------------------------------


class _Collection:
    """The different images among some files, in the order of their hashes, so that neither names
    nor order have a say.

    Attributes:
        features: one for each different content.
        first: for each of them the position of the first file that has it.
        content: for each file the position of its content.
    """

    def __init__(self, paths: list[Path], parallel: _Parallel, stage: str):
        read = list(parallel(_read, paths, stage))
        # Nothing is known of a file that is no image, not even if another equals it.
        keys = [digest(paths[i]) if read[i] else f"no image {i}" for i in range(len(paths))]
        _, self.first, self.content = np.unique(keys, return_index=True, return_inverse=True)
        self.features = [read[i] or _blank() for i in self.first]


def digest(path: str | Path) -> str:
    """Hash of a file's bytes, 16 hexadecimal digits; empty if the file cannot be read."""
    if not os.path.isfile(path):  # noqa: PTH113 a pipe would wait for ever; False for any name
        return ""
    try:
        state = os.stat(path)  # noqa: PTH116 for every image: speed
        return _digest(str(path), state.st_size, state.st_mtime_ns)
    except OSError:
        return ""


@lru_cache(maxsize=2**18)  # most are asked for again, for another comparison
def _digest(path: str, size: int, mtime: int) -> str:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def _unique_names(paths: list[Path]) -> list[str]:
    """Stems of files, or their paths below the common folder where stems repeat."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    root = os.path.commonpath([path.absolute().parent for path in paths])
    return [path.absolute().relative_to(root).as_posix() for path in paths]


@contextmanager
def _threads(workers: int | None, progress: Progress | None) -> Iterator[_Parallel]:
    """Threads that compute on one core each: the libraries' own would compete with these, and would
    let rounding depend on their number."""

    def parallel(function: Callable, tasks: Sequence, stage: str) -> Iterator:
        for done, result in enumerate(pool.imap(function, tasks), start=1):
            if progress:
                progress(done, len(tasks), stage)
            yield result

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with threadpool_limits(1), ThreadPool(workers or os.cpu_count()) as pool:
            yield parallel
    finally:
        cv2.setNumThreads(threads)
