import numpy as np
import pytest
import torch
import toys

from attar.errors import DataError, ModelError, SettingError
from attar.export.run import (
    class_names,
    classify_pictures,
    continue_text,
    embed_texts,
    end_tokens,
    transcribe,
)
from attar.inputs import open_picture, picture_settings, picture_to_pixels, read_tokenizer
from attar.load.mel import log_mel


def test_greedy_text_is_the_likeliest_token_each_time():
    model = toys.language_model()
    tokenizer = read_tokenizer(model.files)
    ids = tokenizer.encode("Hello", add_special_tokens=False).ids
    n_prompt = len(ids)
    for _ in range(9):
        with torch.no_grad():
            logits = model.module(torch.tensor([ids])).logits[0, -1, : tokenizer.get_vocab_size()]
        ids.append(int(logits.argmax()))
        if ids[-1] in end_tokens(model, tokenizer):
            ids.pop()
            break
    wanted = tokenizer.decode(ids).removeprefix("Hello")
    assert len(ids) > n_prompt
    assert continue_text(model, "Hello", max_tokens=9, seed=0) == wanted


def test_drawn_text_depends_on_the_seed_alone():
    model = toys.language_model()
    texts = [
        continue_text(model, "Hello", max_tokens=20, seed=seed, temperature=1.0)
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_writing_ends_at_the_end_token_of_the_config():
    model = toys.language_model()
    tokenizer = read_tokenizer(model.files)
    ids = tokenizer.encode("Hello", add_special_tokens=False).ids
    with torch.no_grad():
        first = int(model.module(torch.tensor([ids])).logits[0, -1].argmax())
    model.module.config.eos_token_id = first
    try:
        assert continue_text(model, "Hello", max_tokens=9, seed=0) == ""
    finally:
        model.module.config.eos_token_id = None
    assert end_tokens(model, tokenizer) == {
        tokenizer.token_to_id("<s>"),
        tokenizer.token_to_id("</s>"),
    }


def test_an_empty_prompt_needs_a_bos():
    with pytest.raises(DataError, match="empty"):
        continue_text(toys.language_model(), "", max_tokens=3, seed=0)
    written = continue_text(toys.language_model(begins=True), "", max_tokens=3, seed=0)
    assert isinstance(written, str)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(SettingError, match="max_tokens is 0"):
        continue_text(toys.language_model(), "Hello", max_tokens=0, seed=0)
    with pytest.raises(SettingError, match="temperature -1"):
        continue_text(toys.language_model(), "Hello", max_tokens=1, seed=0, temperature=-1.0)


def test_pictures_are_ranked_by_probability(tmp_path):
    toys.write_pictures(tmp_path, 2)
    names = [f"thing {number}" for number in range(7)]
    model = toys.picture_model("\n".join(names).encode())
    files = sorted(tmp_path.iterdir())
    found = classify_pictures(model, files, top=3)
    assert [file for file, _ in found] == files
    settings = picture_settings(model.architecture.config)
    for file, ranked in found:
        pixels = picture_to_pixels(open_picture(file), settings)
        with torch.no_grad():
            chances = model.module(pixels[None])[0].softmax(0).tolist()
        wanted = sorted(zip(chances, names, strict=True), reverse=True)[:3]
        assert [name for name, _ in ranked] == [name for _, name in wanted]
        assert [chance for _, chance in ranked] == pytest.approx([c for c, _ in wanted], abs=1e-6)


def test_classes_without_fitting_labels_are_numbered():
    assert class_names({}, 2) == ["class 0", "class 1"]
    assert class_names({"labels.txt": b"one\ntwo\nthree"}, 2) == ["class 0", "class 1"]
    assert class_names({"labels.txt": b"one\ntwo\n"}, 2) == ["one", "two"]


def test_embedding_is_the_same_alone_and_with_others():
    model = toys.sentence_model()
    texts = ["One.", "A longer sentence than the other.", "x" * 2000]
    together = embed_texts(model, texts)
    assert together.shape == (3, 7)
    for text, vector in zip(texts, together, strict=True):
        assert torch.equal(embed_texts(model, [text])[0], vector)
    tokenizer = read_tokenizer(model.files)
    wanted = model.module.vectors.weight[tokenizer.encode("One.").ids].mean(0)
    assert torch.allclose(together[0], wanted, atol=1e-6)
    with pytest.raises(DataError, match="no text"):
        embed_texts(model, [])


def test_sound_of_two_windows_is_transcribed_window_by_window(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    draws = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.wav", draws.uniform(-0.5, 0.5, 8000 * 32), 8000)
    soundfile.write(tmp_path / "short.wav", draws.uniform(-0.5, 0.5, 8000), 8000)
    model = toys.speech_model()
    heard = []

    def features(samples):
        heard.append(len(samples))
        return log_mel(samples)

    text = transcribe(model, tmp_path / "long.wav", features, max_tokens=5)
    assert heard == [480_000, 480_000]
    again = transcribe(model, tmp_path / "long.wav", features, max_tokens=5)
    assert text == again
    assert len(transcribe(model, tmp_path / "short.wav", features, max_tokens=5)) <= 5


def test_a_model_of_another_task_is_refused(tmp_path):
    with pytest.raises(ModelError, match="toy regress is a regress model"):
        continue_text(toys.regression_model(), "Hello", max_tokens=1, seed=0)
    with pytest.raises(ModelError, match="asked for is classify"):
        classify_pictures(toys.language_model(), [])
    with pytest.raises(ModelError, match="asked for is embed"):
        embed_texts(toys.language_model(), ["x"])
    with pytest.raises(ModelError, match="asked for is transcribe"):
        transcribe(toys.language_model(), tmp_path / "x.wav", log_mel)
