import itertools

import pytest
import torch
import toys

from attar.decode import language_step, write_tokens
from attar.errors import DataError, ModelError
from attar.inputs import leading_tokens, read_tokenizer
from attar.load import text
from attar.load.documentation import docstrings, document_names, documents
from attar.load.splits import Counts
from attar.records import Silent

COUNTS = Counts(1000, 300, 500)


def gather(model=None, source=None, *, counts=COUNTS, length=64, seed=0, slices=None):
    return text.language_splits(
        model or toys.language_model(),
        source,
        counts,
        length=length,
        seed=seed,
        slices=slices,
        progress=Silent(),
    )


def runs_of(samples, n=32):
    found = set()
    for sample in samples:
        ids = sample.tensors["tokens"].tolist()
        found |= {tuple(ids[at : at + n]) for at in range(len(ids) - n + 1)}
    return found


def test_no_run_of_32_tokens_of_the_default_text_stands_in_two_splits():
    found = gather(counts=Counts(4096, 1024, 2048), length=128)
    for one, other in itertools.combinations(found.samples, 2):
        assert runs_of(one).isdisjoint(runs_of(other))
    assert all(len(runs_of(split)) > 200 for split in found.samples)


def test_the_default_is_half_written_by_the_model_and_half_documentation():
    found = gather()
    assert "half text the model wrote itself" in found.origin
    assert "documentation of Python" in found.origin
    for split, rows in zip(found.samples, (16, 5, 8), strict=True):
        assert len(split) == rows
        plain = [sum(map(str.isascii, sample.shown)) / len(sample.shown) for sample in split]
        # a random model writes bytes that are no text
        assert sum(share > 0.9 for share in plain) == rows - rows // 2
        assert sum(share < 0.8 for share in plain) == rows // 2


def test_the_same_seed_gives_the_same_text_on_any_number_of_threads():
    before = torch.get_num_threads()
    rows = []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            found = gather(seed=3)
            rows.append([s.tensors["tokens"].tolist() for split in found.samples for s in split])
            assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)
    assert rows[0] == rows[1]
    other = gather(seed=4)
    assert rows[0][0] != other.samples[0][0].tensors["tokens"].tolist()


def test_a_bos_stands_before_every_sequence_where_the_tokenizer_says_so():
    model = toys.language_model(begins=True)
    lead = leading_tokens(read_tokenizer(model.files))
    assert len(lead) == 1
    for split in gather(model).samples:
        for sample in split:
            tokens = sample.tensors["tokens"].tolist()
            assert tokens[0] == lead[0]
            assert len(tokens) == 64


def test_without_such_a_rule_there_is_no_bos():
    assert leading_tokens(read_tokenizer(toys.language_model().files)) == []
    assert leading_tokens(read_tokenizer(toys.sentence_model().files)) != []


def test_written_rows_begin_with_an_opening_word():
    model = toys.language_model()
    tokenizer = read_tokenizer(model.files)
    rows = text.write_rows(model, tokenizer, 5, 20, 0, Silent())
    assert {tokenizer.id_to_token(ids[0]) for ids, _ in rows} <= set(toys.WORDS)
    assert [len(ids) for ids, _ in rows] == [20] * 5
    assert len({tuple(ids) for ids, _ in rows}) == 5


def test_after_a_special_token_the_model_starts_anew():
    model = toys.language_model()
    tokenizer = read_tokenizer(model.files)
    rows = text.write_rows(model, tokenizer, 40, 60, 0, Silent())
    end = tokenizer.token_to_id("</s>")
    after = [ids[at + 1] for ids, _ in rows for at in range(1, 59) if ids[at] == end]
    assert len(after) > 3
    assert {tokenizer.id_to_token(number) for number in after} <= set(toys.WORDS)


def test_written_rows_use_no_number_the_tokenizer_does_not_know():
    model = toys.language_model()
    tokenizer = read_tokenizer(model.files)
    rows = text.write_rows(model, tokenizer, 40, 60, 0, Silent())
    assert max(max(ids) for ids, _ in rows) < tokenizer.get_vocab_size() < 264


def test_the_cache_gives_the_logits_of_reading_everything_again():
    model = toys.language_model()
    tokens = torch.randint(0, 260, (3, 9), generator=torch.Generator().manual_seed(0))
    writing = write_tokens(language_step(model), tokens[:, :2])
    found = [next(writing)] + [writing.send(tokens[:, at]) for at in range(2, 9)]
    with torch.no_grad():
        wanted = model.module(tokens).logits
    for at, logits in enumerate(found):
        assert torch.allclose(logits, wanted[:, at + 1], atol=1e-5)


def test_progress_counts_every_written_token():
    steps = []

    class Counting(Silent):
        def stage(self, name, total):
            steps.append(-total)
            from contextlib import nullcontext

            return nullcontext(steps.append)

    model = toys.language_model(begins=True)
    text.write_rows(model, read_tokenizer(model.files), 3, 11, 0, Counting())
    assert sum(steps) == 0
    assert steps[0] == -33


# ---------------------------------------------------------------------------------------------
# files


def test_a_text_file_is_split_without_a_shared_run(tmp_path):
    file = tmp_path / "book.txt"
    repeated = "This very same paragraph stands everywhere in the book, again and again."
    paragraphs = toys.numbered_text(40).split("\n\n")
    file.write_text("\n\n".join(f"{one}\n\n{repeated}" for one in paragraphs))
    found = gather(source=str(file))
    assert [len(split) for split in found.samples] == [16, 5, 8]
    for one, other in itertools.combinations(found.samples, 2):
        assert runs_of(one).isdisjoint(runs_of(other))
    assert found.origin == f"text from {file}"


def test_too_little_text_says_how_many_tokens_were_found_and_needed(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("Only these words.")
    with pytest.raises(DataError, match=r"holds 17 tokens; 1856 are needed") as caught:
        gather(source=str(file))
    assert "--data" in caught.value.hint


def test_an_empty_file_is_too_little(tmp_path):
    file = tmp_path / "empty.txt"
    file.write_text("")
    with pytest.raises(DataError, match="holds 0 tokens"):
        gather(source=str(file))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("Größe".encode("latin-1") * 100)
    with pytest.raises(DataError, match="UTF-8"):
        gather(source=str(file))


def test_special_tokens_spelled_in_a_text_are_text():
    tokenizer = read_tokenizer(toys.language_model().files)
    ids = tokenizer.encode("a </s> b", add_special_tokens=False).ids
    assert tokenizer.token_to_id("</s>") not in ids
    assert tokenizer.decode(ids) == "a </s> b"


def test_pieces_hold_every_word_of_the_text_in_order():
    whole = toys.numbered_text(30) + "\n \n" + "x" * 30_000 + " end"
    pieces = text.cut_pieces(whole)
    assert "".join("".join(pieces).split()) == "".join(whole.split())
    assert max(len(piece) for piece in pieces) <= 3 * text.PIECE_CHARACTERS
    assert len(pieces) > 20


def test_rows_of_a_table_keep_their_label_and_are_not_mixed(tmp_path):
    file = tmp_path / "labelled.tsv"
    lines = ["text\tlabel"]
    for number, paragraph in enumerate(toys.numbered_text(40).split("\n\n")):
        label = "loud" if number % 2 else "quiet"
        lines.append(f"{paragraph.upper() if label == 'loud' else paragraph.lower()}\t{label}")
    file.write_text("\n".join(lines))
    found = gather(source=str(file))
    for split in found.samples:
        assert {sample.label for sample in split} == {"loud", "quiet"}
        for sample in split:
            assert sample.shown.isupper() == (sample.label == "loud")


def test_slices_without_data_are_refused():
    with pytest.raises(DataError, match="needs --data"):
        gather(slices="topic")


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ModelError, match="no tokenizer"):
        read_tokenizer({})
    with pytest.raises(ModelError, match="cannot be read"):
        read_tokenizer({"tokenizer.json": b'{"broken": '})


# ---------------------------------------------------------------------------------------------
# sentences and documentation


def test_sentences_are_prose_and_stand_in_one_split_only():
    found = text.sentence_splits(
        toys.sentence_model(), None, Counts(60, 20, 30), seed=0, slices=None
    )
    shown = [[sample.shown for sample in split] for split in found.samples]
    assert [len(split) for split in shown] == [60, 20, 30]
    flat = [one.lower() for split in shown for one in split]
    assert len(set(flat)) == 110
    assert all(one[-1] in ".!?" for one in flat)
    tokenizer = read_tokenizer(toys.sentence_model().files)
    for sample in found.samples[0]:
        tokens = sample.tensors["tokens"]
        assert tokens[0] == tokenizer.token_to_id("<s>")
        assert tokens[-1] == tokenizer.token_to_id("</s>")
        assert len(tokens) <= text.LONGEST_SENTENCE
        assert sample.tensors["attention"].tolist() == [1] * len(tokens)


def test_too_few_sentences_are_counted(tmp_path):
    file = tmp_path / "few.txt"
    file.write_text("One sentence. Another one. One sentence.")
    with pytest.raises(DataError, match="holds 2 sentences"):
        text.sentence_splits(toys.sentence_model(), str(file), Counts(3, 1, 1), seed=0, slices=None)


def test_documentation_is_the_same_for_the_same_seed_and_has_no_repeats():
    first = list(itertools.islice(documents(0, 2000), 30))
    assert first == list(itertools.islice(documents(0, 2000), 30))
    assert first != list(itertools.islice(documents(1, 2000), 30))
    paragraphs = [
        paragraph.strip()
        for _, whole in first
        for paragraph in whole.split("\n\n")
        if len(paragraph) > 200
    ]
    assert len(paragraphs) == len(set(paragraphs)) > 20


def test_documentation_has_topics_and_modules_and_no_jokes():
    names = document_names()
    assert "topic assert" in names
    assert "module argparse" in names
    assert "module this" not in names


def test_docstrings_are_read_without_running_the_source():
    long = ("word " * 30).strip()
    source = (
        f'"""{long}"""\nraise SystemExit\ndef f():\n    """{long} two"""\nclass C:\n  """x"""\n'
    )
    assert docstrings(source) == [long, f"{long} two"]
    assert docstrings("def broken(") == []
