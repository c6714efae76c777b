import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from PIL import Image

from attar.errors import DataError, ModelError
from attar.inputs import (
    PictureSettings,
    box_to_pixels,
    open_picture,
    picture_settings,
    picture_to_pixels,
)
from attar.load.pictures import SKIMAGE_PICTURES, draw_crop, picture_splits
from attar.load.splits import Counts
from attar.records import Silent

NEAREST = PictureSettings(4, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5), "nearest", 1.0)


COUNTS = Counts(6, 3, 5)


def gather(source=None, *, counts=COUNTS, seed=0, slices=None):
    return picture_splits(
        toys.picture_model(), source, counts, seed=seed, slices=slices, progress=Silent()
    )


def names_of(split):
    return {sample.shown.split(", crop")[0] for sample in split}


def test_default_pictures_of_one_split_are_in_no_other():
    pytest.importorskip("skimage")
    found = gather(counts=Counts(25, 9, 25))
    shown = [names_of(split) for split in found.samples]
    assert [len(split) for split in found.samples] == [25, 9, 25]
    assert sum(map(len, shown)) == len(set().union(*shown)) == len(SKIMAGE_PICTURES)
    assert found.origin == (
        "sample pictures of scikit-image; 59 views (crops, scales, mirror images) of 20 pictures"
    )


def test_views_of_one_picture_differ():
    pytest.importorskip("skimage")
    found = gather(counts=Counts(25, 9, 25))
    pixels = [sample.tensors["pixels"] for split in found.samples for sample in split]
    assert all(one.shape == (3, 33, 33) and one.isfinite().all() for one in pixels)
    assert len({one.numpy().tobytes() for one in pixels}) == len(pixels)
    shown = [sample.shown for split in found.samples for sample in split]
    assert len(set(shown)) == len(shown)


def test_the_same_seed_gives_the_same_pictures(tmp_path):
    toys.write_pictures(tmp_path, 5)
    first, again, other = (
        gather(str(tmp_path)),
        gather(str(tmp_path)),
        gather(str(tmp_path), seed=1),
    )
    for one, two in zip(first.samples, again.samples, strict=True):
        assert [s.shown for s in one] == [s.shown for s in two]
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a.tensors["pixels"], b.tensors["pixels"])
    assert [s.shown for s in first.samples[0]] != [s.shown for s in other.samples[0]]


def test_enough_pictures_are_used_whole_and_once(tmp_path):
    toys.write_pictures(tmp_path, 17)
    found = gather(str(tmp_path))
    shown = [sample.shown for split in found.samples for sample in split]
    assert len(set(shown)) == 14
    assert not any("crop" in one for one in shown)
    assert found.origin.endswith("; 14 pictures")


def test_fewer_than_three_pictures_are_refused(tmp_path):
    toys.write_pictures(tmp_path, 2)
    with pytest.raises(DataError, match="holds 2 pictures"):
        gather(str(tmp_path))


def test_sub_folders_are_slices(tmp_path):
    toys.write_pictures(tmp_path / "cats", 8)
    toys.write_pictures(tmp_path / "dogs", 8, seed=1)
    found = gather(str(tmp_path))
    for split in found.samples:
        for sample in split:
            assert sample.shown.startswith(f"{sample.label}/")
    assert {sample.label for sample in found.samples[0]} == {"cats", "dogs"}


def test_too_many_sub_folders_are_no_slices_and_the_origin_says_so(tmp_path):
    for number in range(25):
        toys.write_pictures(tmp_path / f"class{number}", 1, seed=number)
    found = gather(str(tmp_path))
    assert {sample.label for sample in found.samples[0]} == {""}
    assert "25, the limit is 24" in found.origin


def test_a_label_file_gives_slices_and_misses_are_named(tmp_path):
    folder = tmp_path / "pictures"
    toys.write_pictures(folder, 4)
    labels = tmp_path / "labels.tsv"
    lines = [
        f"picture{number:02}.png\t{'even' if number % 2 == 0 else 'odd'}" for number in range(4)
    ]
    labels.write_text("\n".join(lines))
    found = gather(str(folder), slices=str(labels))
    for split in found.samples:
        for sample in split:
            number = int(sample.shown[7:9])
            assert sample.label == ("odd" if number % 2 else "even")
    labels.write_text("\n".join(lines[:3]))
    with pytest.raises(DataError, match=r"no label for picture03\.png"):
        gather(str(folder), slices=str(labels))


def test_a_table_gives_true_answers_by_name_or_number(tmp_path):
    toys.write_pictures(tmp_path, 4)
    names = ("a hen", "a cock", "a goose")
    model = toys.picture_model()
    model = replace(model, files={**model.files, "labels.txt": "\n".join(names).encode()})
    given = ["a goose", "0", "", "a cock"]
    table = tmp_path / "t.tsv"

    def gathered(answers):
        rows = [f"picture{i:02}.png\t{'ab'[i % 2]}\t{a}" for i, a in enumerate(answers)]
        table.write_text("\n".join(["path\tlabel\tanswer", *rows]))
        return picture_splits(
            model, str(table), COUNTS, seed=0, slices=None, progress=Silent()
        ).samples

    for split in gathered(given):
        for sample in split:
            assert sample.answer == (2, 0, -1, 1)[int(sample.shown[7:9])]
    for wrong in ("a hed", "3", "-1"):
        with pytest.raises(DataError, match="no class of the model") as error:
            gathered([wrong, *given[1:]])
        assert "a hen" in error.value.hint


def test_an_unreadable_picture_is_named(tmp_path):
    toys.write_pictures(tmp_path, 4)
    whole = (tmp_path / "picture02.png").read_bytes()
    for broken in (b"", b"no picture", whole[: len(whole) // 2]):
        (tmp_path / "picture02.png").write_bytes(broken)
        with pytest.raises(DataError, match=r"picture02.png cannot be read as a picture"):
            open_picture(tmp_path / "picture02.png")


def test_an_empty_folder_says_what_it_holds(tmp_path):
    with pytest.raises(DataError, match="holds nothing"):
        gather(str(tmp_path))
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match=r"holds 1 \.txt"):
        gather(str(tmp_path))


def test_pixels_are_those_of_plain_loops():
    draws = np.random.default_rng(0)
    values = draws.integers(0, 256, (12, 20, 3), dtype=np.uint8)
    found = picture_to_pixels(Image.fromarray(values), NEAREST)
    # the central square of 12 pixels, every third pixel from the middle of the first three
    for channel in range(3):
        for row in range(4):
            for column in range(4):
                value = values[3 * row + 1, 4 + 3 * column + 1, channel] / 255
                wanted = (value - NEAREST.mean[channel]) / NEAREST.std[channel]
                assert float(found[channel, row, column]) == pytest.approx(wanted, abs=1e-6)


def test_a_mirrored_box_is_the_box_from_right_to_left():
    draws = np.random.default_rng(0)
    picture = Image.fromarray(draws.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    box = (1.0, 2.0, 8.0, 9.0)
    plain = box_to_pixels(picture, box, NEAREST)
    mirrored = box_to_pixels(picture, box, NEAREST, mirrored=True)
    assert torch.equal(plain.flip(-1), mirrored)


def test_transparent_parts_are_white_and_grey_becomes_three_channels(tmp_path):
    Image.new("RGBA", (5, 5), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((2, 2)) == (255, 255, 255)
    Image.new("L", (5, 5), 77).save(tmp_path / "grey.png")
    assert open_picture(tmp_path / "grey.png").getpixel((2, 2)) == (77, 77, 77)


@pytest.mark.parametrize("size", [(1, 1), (3, 1000), (640, 427)])
def test_crops_lie_inside_the_picture(size):
    picture = Image.new("RGB", size)
    for seed in range(200):
        left, upper, right, lower = draw_crop(picture, random.Random(seed)).box
        assert 0 <= left < right <= size[0]
        assert 0 <= upper < lower <= size[1]


@pytest.mark.parametrize(
    "found",
    [
        None,
        {},
        {"size": 0, "mean": [0, 0, 0], "std": [1, 1, 1]},
        {"size": 8, "mean": [0, 0], "std": [1, 1, 1]},
        {"size": 8, "mean": [0, 0, 0], "std": [1, 0, 1]},
        {"size": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "magic"},
        {"size": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "crop_fraction": 1.5},
    ],
)
def test_unusable_picture_settings_are_refused(found):
    with pytest.raises(ModelError, match="picture"):
        picture_settings({"picture": found})
