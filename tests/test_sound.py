from functools import partial

import numpy as np
import pytest
import torch
import toys

from attar.decode import transcribe_windows
from attar.errors import DataError
from attar.inputs import SAMPLE_RATE, WINDOW_SAMPLES, read_tokenizer, sound_to_windows
from attar.load import sound
from attar.load.splits import Counts, into_batches
from attar.records import Silent

soundfile = pytest.importorskip("soundfile")
SPECIAL = range(257, 262)


def write_tone(path, seconds=0.4, rate=16_000, hertz=440.0, channels=1):
    times = np.arange(round(seconds * rate)) / rate
    tone = 0.5 * np.sin(2 * np.pi * hertz * times)
    soundfile.write(path, np.stack([tone] * channels, axis=1), rate)


def write_tones(folder, n):
    for number in range(n):
        write_tone(folder / f"tone{number}.wav", hertz=300.0 + 150 * number)


@pytest.fixture(autouse=True)
def short_transcripts(monkeypatch):
    # a random model never comes to an end
    monkeypatch.setattr(sound, "transcribe_windows", partial(transcribe_windows, max_tokens=7))


def gather(source, counts=None, seed=0):
    return sound.sound_splits(
        toys.speech_model(), source, counts, seed=seed, slices=None, progress=Silent()
    )


def test_without_data_a_speech_model_is_refused():
    with pytest.raises(DataError) as caught:
        gather(None)
    assert caught.value.hint == "give --data FOLDER of .wav or .flac files"


def test_files_of_one_split_are_in_no_other(tmp_path):
    write_tones(tmp_path, 5)
    found = gather(str(tmp_path))
    shown = [{sample.shown for sample in split} for split in found.samples]
    assert [len(split) for split in shown] == [2, 1, 2]
    assert len(set().union(*shown)) == 5
    assert found.origin == f"sound from {tmp_path}: 5 windows"


def test_the_decoder_is_fed_the_models_own_transcript(tmp_path):
    write_tones(tmp_path, 3)
    found = gather(str(tmp_path), Counts(1, 1, 1))
    model = toys.speech_model()
    sample = found.samples[0][0].tensors
    tokens = sample["decoder_tokens"]
    assert tokens[0] == 257
    assert tokens[1] in (258, 259)
    assert tokens[2:4].tolist() == [260, 261]
    assert sample["mask"].tolist() == [False] * 3 + [True] * (len(tokens) - 3)
    batch = {name: tensor[None] for name, tensor in sample.items()}
    with torch.no_grad():
        logits = model.task.forward(model.module, batch)[0]
    # every token of the text is the likeliest ordinary one after those before it, cache or not
    logits[:, list(SPECIAL)] = -torch.inf
    assert len(tokens) > 4
    assert logits[3:-1].argmax(1).tolist() == tokens[4:].tolist()


def test_batches_of_transcripts_of_different_length_are_masked(tmp_path):
    write_tones(tmp_path, 3)
    samples = [split[0] for split in gather(str(tmp_path), Counts(1, 1, 1)).samples]
    short = dict(samples[0].tensors)
    short["decoder_tokens"], short["mask"] = short["decoder_tokens"][:5], short["mask"][:5]
    (batch,) = into_batches([type(samples[0])(short), samples[1]], 2)
    assert batch["mask"][0].sum() == 2
    assert not batch["mask"][0, 5:].any()
    assert batch["decoder_tokens"].shape == batch["mask"].shape
    assert batch["features"].shape == (2, 80, 3000)


def test_too_few_files_are_refused(tmp_path):
    write_tones(tmp_path, 2)
    with pytest.raises(DataError, match="2 windows of 30 seconds in 2 files; 3 are needed"):
        gather(str(tmp_path))
    write_tones(tmp_path, 3)
    with pytest.raises(DataError, match="9 are needed"):
        gather(str(tmp_path), Counts(3, 3, 3))


def test_pictures_do_not_fit_a_speech_model(tmp_path):
    toys.write_pictures(tmp_path, 2)
    with pytest.raises(DataError, match=r"holds 2 \.png"):
        gather(str(tmp_path))


def test_a_broken_sound_file_is_named(tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"RIFF but no more")
    with pytest.raises(DataError, match=r"noise.wav cannot be read as sound"):
        sound_to_windows(tmp_path / "noise.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(DataError, match="no sound"):
        sound_to_windows(tmp_path / "empty.wav")


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
def test_a_tone_keeps_its_pitch_at_16_khz(tmp_path, rate):
    write_tone(tmp_path / "tone.wav", seconds=1.0, rate=rate, hertz=1000.0, channels=2)
    (window,) = sound_to_windows(tmp_path / "tone.wav")
    power = torch.fft.rfft(window[:SAMPLE_RATE]).abs()
    assert int(power.argmax()) == 1000
    # a sine of amplitude 0.5 has the mean square 1/8; resampling filters touch the two ends
    assert float(window[:SAMPLE_RATE].square().mean()) == pytest.approx(0.125, rel=0.02)
    assert not window[SAMPLE_RATE + 100 :].any()


@pytest.mark.parametrize(("seconds", "windows"), [(0.1, 1), (30, 1), (30.3, 1), (31, 2), (61, 3)])
def test_long_sound_is_cut_into_windows_of_30_seconds(tmp_path, seconds, windows):
    write_tone(tmp_path / "long.wav", seconds=seconds, rate=8_000)
    found = sound_to_windows(tmp_path / "long.wav")
    assert found.shape == (windows, WINDOW_SAMPLES)
    assert found.dtype == torch.float32


def test_the_toy_tokenizer_has_whispers_tokens():
    tokenizer = read_tokenizer(toys.speech_model().files)
    assert tokenizer.token_to_id("<|endoftext|>") == 256
    assert tokenizer.token_to_id("<|notimestamps|>") == 261
