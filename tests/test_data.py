import numpy as np
import pytest
import safetensors.numpy
import torch
import toys

from attar.errors import AttarError, DataError, SettingError
from attar.load.data import DataSizes, load_data
from attar.load.splits import Counts, Dealer, Sample, deal_evenly, into_batches
from attar.records import Silent

SMALL = DataSizes(640, 320, 448, sequence_length=64)  # tokens: 10, 5 and 7 sequences


def gather(model, source=None, *, sizes=SMALL, seed=0, **more):
    return load_data(model, source, seed=seed, sizes=sizes, progress=Silent(), **more)


def write_arrays(path, n=20, seed=0, **more):
    draws = np.random.default_rng(seed)
    arrays = {"inputs": draws.normal(size=(n, 3)).astype(np.float32), **more}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    return arrays


def as_bytes(batches, name):
    return [row.numpy().tobytes() for batch in batches for row in batch[name]]


# ---------------------------------------------------------------------------------------------
# all tasks


def test_splits_of_text_share_no_sequence_and_have_the_asked_sizes():
    data = gather(toys.language_model())
    splits = [as_bytes(split, "tokens") for split in (data.calibration, data.recovery, data.audit)]
    assert [len(split) for split in splits] == [10, 5, 7]
    assert len(set().union(*splits)) == 22
    assert data.calibration[0]["tokens"].dtype == torch.int64
    assert data.slices == ()
    assert len(data.shown) == 7


def test_the_same_seed_gives_the_same_batches():
    one, two, other = (gather(toys.language_model(), seed=seed) for seed in (5, 5, 6))
    assert as_bytes(one.audit, "tokens") == as_bytes(two.audit, "tokens")
    assert one.shown == two.shown
    assert as_bytes(one.audit, "tokens") != as_bytes(other.audit, "tokens")


@pytest.mark.parametrize(("sequences", "most"), [(1, 1), (3, 3), (100, 8)])
def test_outputs_of_a_batch_stay_within_the_bytes(sequences, most):
    model = toys.language_model()
    bytes_per_sequence = 64 * 264 * 4  # predictions, width, float32
    data = gather(model, outputs_per_batch_bytes=sequences * bytes_per_sequence + 5)
    assert max(len(batch["tokens"]) for batch in data.calibration) == min(most, 10)
    assert sum(len(batch["tokens"]) for batch in data.calibration) == 10


def test_one_sample_is_a_batch_even_where_it_is_too_large():
    data = gather(toys.language_model(), outputs_per_batch_bytes=1)
    assert {len(batch["tokens"]) for batch in data.calibration} == {1}


def test_sentences_are_padded_where_attention_is_zero():
    data = gather(toys.sentence_model(), sizes=DataSizes(20, 5, 7))
    assert len(data.shown) == 7
    for batch in data.calibration:
        assert batch["tokens"].shape == batch["attention"].shape
        assert not batch["tokens"][batch["attention"] == 0].any()
        outputs = toys.sentence_model().task.forward(toys.sentence_model().module, batch)
        assert outputs.isfinite().all()


def test_slices_follow_the_calibration_batches(tmp_path):
    toys.write_pictures(tmp_path / "cats", 8)
    toys.write_pictures(tmp_path / "dogs", 8, seed=1)
    data = gather(toys.picture_model(), str(tmp_path), sizes=DataSizes(9, 2, 3))
    assert [len(labels) for labels in data.slices] == [
        len(batch["pixels"]) for batch in data.calibration
    ]
    assert {label for labels in data.slices for label in labels} == {"cats", "dogs"}
    assert [shown.split("/")[0] in ("cats", "dogs") for shown in data.shown] == [True] * 3


def test_every_batch_is_accepted_by_its_model(tmp_path):
    toys.write_pictures(tmp_path, 6)
    write_arrays(tmp_path / "arrays.npz")
    cases = [
        (toys.picture_model(), str(tmp_path), DataSizes(4, 2, 3)),
        (toys.regression_model(), str(tmp_path / "arrays.npz"), DataSizes()),
        (toys.language_model(), None, SMALL),
    ]
    for model, source, sizes in cases:
        data = gather(model, source, sizes=sizes)
        for batch in (*data.calibration, *data.recovery, *data.audit):
            n_samples = {len(tensor) for tensor in batch.values()}
            with torch.no_grad():
                outputs = model.task.forward(model.module, batch)
            assert n_samples == {len(outputs)}
            assert outputs.ndim == 3


# ---------------------------------------------------------------------------------------------
# arrays


@pytest.mark.parametrize("name", ["arrays.npz", "arrays.safetensors"])
def test_arrays_are_split_without_overlap(tmp_path, name):
    arrays = write_arrays(tmp_path / name)
    data = gather(toys.regression_model(), str(tmp_path / name), sizes=DataSizes())
    splits = [as_bytes(split, "inputs") for split in (data.calibration, data.recovery, data.audit)]
    assert [len(split) for split in splits] == [8, 4, 8]
    assert set().union(*splits) == {row.tobytes() for row in arrays["inputs"]}


def test_an_array_of_labels_gives_slices(tmp_path):
    labels = np.array(["low", "high"] * 10)
    arrays = write_arrays(tmp_path / "a.npz", kind=labels)
    data = gather(
        toys.regression_model(), str(tmp_path / "a.npz"), sizes=DataSizes(6, 3, 6), slices="kind"
    )
    label_of = {row.tobytes(): label for row, label in zip(arrays["inputs"], labels, strict=True)}
    found = [label for batch in data.slices for label in batch]
    assert found == [label_of[row] for row in as_bytes(data.calibration, "inputs")]
    with pytest.raises(DataError, match="no array colour"):
        gather(toys.regression_model(), str(tmp_path / "a.npz"), sizes=DataSizes(), slices="colour")


def test_an_array_of_answers_and_the_labels_follow_the_audit_samples(tmp_path):
    labels, answers = np.array(["low", "high"] * 10), np.arange(20) - 1
    arrays = write_arrays(tmp_path / "a.npz", kind=labels, answers=answers)
    data = gather(
        toys.regression_model(), str(tmp_path / "a.npz"), sizes=DataSizes(6, 3, 6), slices="kind"
    )
    place = {row.tobytes(): number for number, row in enumerate(arrays["inputs"])}
    shown = [place[row] for row in as_bytes(data.audit, "inputs")]
    assert data.answers == [answers[number] for number in shown]
    assert data.audit_slices == [labels[number] for number in shown]
    write_arrays(tmp_path / "b.npz", answers=answers / 2)
    with pytest.raises(DataError, match="the array answers"):
        gather(toys.regression_model(), str(tmp_path / "b.npz"), sizes=DataSizes(6, 3, 6))


def test_without_labels_or_answers_there_are_none(tmp_path):
    write_arrays(tmp_path / "a.npz")
    data = gather(toys.regression_model(), str(tmp_path / "a.npz"), sizes=DataSizes())
    assert data.answers == () and data.audit_slices == ()


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"inputs": np.zeros((9, 4), np.float32)}, r"has the shape \(9, 4\)"),
        ({"inputs": np.zeros(9, np.float32)}, r"has the shape \(9,\)"),
        ({"outputs": np.zeros((9, 3), np.float32)}, "no array inputs; it has outputs"),
        ({"inputs": np.full((9, 3), np.nan, np.float32)}, "NaN"),
        ({"inputs": np.full((9, 3), "x")}, "the model needs torch.float32"),
        ({"inputs": np.zeros((2, 3), np.float32)}, "holds 2 samples; 3 are needed"),
        ({"inputs": np.zeros((0, 3), np.float32)}, "holds 0 samples"),
        ({"inputs": np.array([[{}, 1, 2]], dtype=object)}, "cannot be read"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, found):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=found):
        gather(toys.regression_model(), str(tmp_path / "a.npz"), sizes=DataSizes())


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04 cut off", b"\xff" * 64])
def test_broken_array_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        gather(toys.regression_model(), str(tmp_path / name), sizes=DataSizes())


def test_one_array_without_a_name_is_refused(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.zeros((9, 3), np.float32))
    with pytest.raises(DataError, match="without a name"):
        gather(toys.regression_model(), str(tmp_path / "a.npz"), sizes=DataSizes())


def test_token_arrays_fit_a_language_model(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 260, (9, 6))
    np.savez(tmp_path / "a.npz", tokens=tokens)
    data = gather(toys.language_model(), str(tmp_path / "a.npz"), sizes=DataSizes())
    assert sum(len(batch["tokens"]) for batch in data.calibration) == 4
    np.savez(tmp_path / "b.npz", tokens=tokens.astype(np.float32))
    with pytest.raises(DataError, match="is float32"):
        gather(toys.language_model(), str(tmp_path / "b.npz"), sizes=DataSizes())


# ---------------------------------------------------------------------------------------------
# data that does not fit


def test_each_misfit_says_what_was_found_and_what_to_give(tmp_path):
    toys.write_pictures(tmp_path / "pictures", 4)
    (tmp_path / "words.txt").write_text("Some words.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_header.tsv").write_text("hello\tworld\n")
    (tmp_path / "ragged.tsv").write_text("text\tlabel\none\n")
    (tmp_path / "lost.tsv").write_text("path\tlabel\nnowhere.png\tx\n")
    cases = [
        (toys.language_model(), "pictures", r"holds 4 \.png"),
        (toys.language_model(), "missing", "is not there"),
        (toys.language_model(), "empty", "holds nothing"),
        (toys.language_model(), "no_header.tsv", "columns hello, world"),
        (toys.language_model(), "ragged.tsv", "line 2 .* has 1 columns"),
        (toys.picture_model(), "words.txt", r"is a \.txt"),
        (toys.picture_model(), "lost.tsv", "names nowhere.png"),
        (toys.regression_model(), "words.txt", r"is a \.txt; the model reads tensors"),
        (toys.regression_model(), "missing.npz", "is not there"),
    ]
    for model, name, found in cases:
        with pytest.raises(DataError, match=found) as caught:
            gather(model, str(tmp_path / name), sizes=DataSizes())
        assert caught.value.hint


def test_a_model_of_ones_own_has_no_default_data():
    with pytest.raises(DataError) as caught:
        gather(toys.regression_model(), sizes=DataSizes())
    assert caught.value.hint == "give --data FILE.npz or FILE.safetensors with the arrays inputs"


def test_a_slice_column_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "t.tsv").write_text("text\ttopic\nhello\tx\n")
    with pytest.raises(DataError, match="no column colour; it has text, topic"):
        gather(toys.language_model(), str(tmp_path / "t.tsv"), slices="colour")


def test_samples_without_a_label_among_others_are_refused(tmp_path):
    lines = ["path\tlabel"]
    toys.write_pictures(tmp_path, 9)
    lines += [f"picture{n:02}.png\t{'x' if n % 2 else ''}" for n in range(9)]
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    with pytest.raises(DataError, match="have no label"):
        gather(toys.picture_model(), str(tmp_path / "t.tsv"), sizes=DataSizes(5, 2, 2))


def test_sizes_out_of_range_are_refused():
    with pytest.raises(SettingError, match="0 predictions"):
        gather(toys.language_model(), sizes=DataSizes(calibration=0))
    with pytest.raises(SettingError, match="sequence_length is 3"):
        DataSizes(sequence_length=3)
    with pytest.raises(SettingError, match="or none"):
        DataSizes(calibration=5).counts("regress", None)


def test_sizes_left_out_are_the_default_of_the_task():
    assert DataSizes().counts("language", Counts(1, 2, 3)) == Counts(1, 2, 3)
    assert DataSizes(audit=9).counts("language", Counts(1, 2, 3)) == Counts(1, 2, 9)
    assert DataSizes().counts("regress", None) is None


def test_every_error_is_one_the_command_line_knows():
    assert issubclass(DataError, AttarError)
    assert issubclass(SettingError, AttarError)


# ---------------------------------------------------------------------------------------------
# dealing and batching


@pytest.mark.parametrize("n_sources", [3, 7, 33, 123])
def test_every_split_gets_its_share_and_no_source_twice(n_sources):
    counts = Counts(16, 8, 16)
    dealt = deal_evenly(n_sources, counts)
    flat = [source for split in dealt for source in split]
    assert len(set(flat)) == len(flat) == min(n_sources, 40)
    for split, count in zip(dealt, counts.as_tuple(), strict=True):
        assert 1 <= len(split) <= count
        assert abs(len(split) - min(n_sources, 40) * count / 40) <= 1.5


def test_a_dealer_serves_the_split_that_lacks_most():
    dealer = Dealer((100, 10, 50))
    assert [dealer.deal(20) for _ in range(5)] == [0, 1, 2, 0, 0]
    assert not dealer.filled()


def test_batches_keep_the_order_and_fill_with_zeros():
    samples = [Sample({"tokens": torch.arange(1, n + 1)}) for n in (3, 1, 2)]
    first, second = into_batches(samples, 2)
    assert first["tokens"].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert second["tokens"].tolist() == [[1, 2]]
