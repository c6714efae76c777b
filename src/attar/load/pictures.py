"""Pictures for vision models: a folder, or the sample pictures that scikit-image ships."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

from attar.errors import DataError
from attar.inputs import (
    PICTURE_SUFFIXES,
    PictureSettings,
    box_to_pixels,
    open_picture,
    picture_settings,
    picture_to_pixels,
)
from attar.load.sources import Entry, read_entries
from attar.load.splits import Counts, Sample, Splits, deal_evenly

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from attar.records import Model, Progress

WANTED = "a folder of pictures (.jpg, .jpeg or .png), or a .tsv table with a column path"
MIN_PICTURES = 3  # one for each split
# Pictures inside the installed wheel. Left out: chessboards, logo and diagrams (no photographs),
# motorcycle_right (the other eye's view of motorcycle_left), tiny ones.
SKIMAGE_PICTURES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "horse.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)


@dataclass(frozen=True)
class Crop:
    """A part of a picture: box in pixels (left, upper, right, lower), perhaps mirrored."""

    box: tuple[float, float, float, float]
    mirrored: bool


def picture_splits(
    model: Model,
    source: str | None,
    counts: Counts,
    *,
    seed: int,
    slices: str | None,
    progress: Progress,
) -> Splits:
    """Pictures as the model wants them; all crops of one picture are in one split.

    Where there are fewer pictures than `counts` asks for, seeded crops at other places and scales
    and mirror images are added, and `origin` says so.

    Raises:
        DataError: Fewer than three pictures, an unreadable one, or labels that do not fit.
    """
    entries, origin = _find_pictures(source, slices)
    if len(entries) < MIN_PICTURES:
        raise DataError(
            f"{source} holds {len(entries)} pictures; {MIN_PICTURES} or more are needed, because "
            "calibration, recovery and audit share none.",
            hint="add pictures, or leave --data out for the default ones",
        )
    random.Random(f"pictures {seed}").shuffle(entries)
    dealt = deal_evenly(len(entries), counts)
    total = sum(counts.as_tuple())
    samples = []
    with progress.stage("read pictures", float(total)) as advance:
        for chosen, count in zip(dealt, counts.as_tuple(), strict=True):
            some = [entries[place] for place in chosen]
            samples.append(tuple(_views(some, range(count), model, seed, advance)))
    n_pictures = sum(len(chosen) for chosen in dealt)
    if n_pictures < total:
        origin += f"; {total} views (crops, scales, mirror images) of {n_pictures} pictures"
    else:
        origin += f"; {n_pictures} pictures"
    left = sorted(set(range(len(entries))).difference(*dealt))
    # Pictures of no split first, then other views of these and of what calibration has.
    free = [entries[place] for place in (*left, *dealt[0])]
    unseen = len(free) * -(-counts.calibration // len(dealt[0]))
    numbers = [*range(len(left)), *range(unseen, unseen + counts.more)][: counts.more]
    more = _views(free, numbers, model, seed, lambda _: None)
    return Splits((samples[0], samples[1], samples[2]), origin, tuple(more))


def _views(
    entries: Sequence[Entry],
    numbers: Iterable[int],
    model: Model,
    seed: int,
    advance: Callable[[int | float], None],
) -> Iterator[Sample]:
    """Views of pictures by number: first one of each, then another of each, and so on."""
    settings = picture_settings(model.architecture.config)
    for number in numbers:
        entry = entries[number % len(entries)]
        answer = class_number(entry, model.files)
        yield _view(entry, number // len(entries), seed, settings, answer)
        advance(1)


def _find_pictures(source: str | None, slices: str | None) -> tuple[list[Entry], str]:
    if source is not None:
        entries, note = read_entries(source, PICTURE_SUFFIXES, WANTED, slices)
        return entries, f"pictures from {source}" + (f" ({note})" if note else "")
    if slices is not None:
        raise DataError(
            f"--slices {slices} needs --data, because the default pictures have no labels.",
            hint="give the labelled pictures with --data FOLDER",
        )
    found = util.find_spec("skimage")
    if found is None or found.origin is None:
        raise DataError(
            "there is no --data, and scikit-image, whose sample pictures are the default, is not "
            "installed.",
            hint="pip install 'attar[vision]', or give pictures with --data FOLDER",
        )
    folder = Path(found.origin).parent / "data"
    paths = [folder / name for name in SKIMAGE_PICTURES if (folder / name).is_file()]
    return [Entry(path.name, path, None) for path in paths], "sample pictures of scikit-image"


def class_number(entry: Entry, files: Mapping[str, bytes]) -> int:
    """Number of the class that an entry is said to be of; -1 where nothing is said.

    Raises:
        DataError: Neither a number nor a line of the model's labels.txt.
    """
    if not entry.answer:
        return -1
    names = files.get("labels.txt", b"").decode("utf-8", errors="replace").splitlines()
    if entry.answer in names:
        return names.index(entry.answer)
    if entry.answer.isdecimal() and (not names or int(entry.answer) < len(names)):
        return int(entry.answer)
    near = get_close_matches(entry.answer, names, n=3, cutoff=0.3) or names[:3]
    raise DataError(
        f"the answer {entry.answer!r} of {entry.name} is no class of the model.",
        hint=f"give its number, from 0 on, or its name, such as {', '.join(near) or '0'}",
    )


def _view(entry: Entry, number: int, seed: int, settings: PictureSettings, answer: int) -> Sample:
    """View 0 is the whole picture as the model is normally given it; the others are crops."""
    assert entry.path is not None
    picture = open_picture(entry.path)
    shown = entry.name if number == 0 else f"{entry.name}, crop {number}"
    pixels: Tensor
    if number == 0:
        pixels = picture_to_pixels(picture, settings)
    else:
        crop = draw_crop(picture, random.Random(f"{seed} {entry.name} {number}"))
        pixels = box_to_pixels(picture, crop.box, settings, mirrored=crop.mirrored)
    return Sample({"pixels": pixels}, entry.label, shown, answer)


def draw_crop(picture: Image.Image, draws: random.Random) -> Crop:
    """Draw a box of 25 to 100% of the area and of shape 3:4 to 4:3, inside the picture."""
    area = picture.width * picture.height * draws.uniform(0.25, 1)
    shape = draws.uniform(3 / 4, 4 / 3)
    width = min(picture.width, (area * shape) ** 0.5)
    height = min(picture.height, (area / shape) ** 0.5)
    left = draws.uniform(0, picture.width - width)
    upper = draws.uniform(0, picture.height - height)
    # rounding must not push the far edge out of the picture: Pillow refuses such a box
    right = min(float(picture.width), left + width)
    lower = min(float(picture.height), upper + height)
    return Crop((left, upper, right, lower), draws.random() < 0.5)
