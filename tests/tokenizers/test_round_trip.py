"""Text that a tokenizer loses is found: refused where a pattern loses it, counted where the tokenizer's own files do."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from megatron_patch.errors import DataError
from megatron_patch.preprocess.encode import EncodeSettings
from megatron_patch.preprocess.pipeline import preprocess
from megatron_patch.tokenizers.base import HuggingFaceTokenizer, SentencePieceTokenizer, encode, load_tokenizer
from megatron_patch.tokenizers.byte_counts import ByteCounts, make_byte_counts
from megatron_patch.tokenizers.byte_level import byte_letters
from megatron_patch.tokenizers.round_trip import Loss, RoundTrip, TextChecks, check_round_trip, missing
from tests.preprocess.random_tokenizers import CORPUS
from tests.tokenizers.tokenizer_json import byte_level_json, write

SPACES = "does not give back all white space"


def byte_level(before=None, alphabet=True, normalizer=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = before or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet else []
    backend.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False))
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


def removing(pattern, invert=False):
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=invert)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def word_piece(lowercase=True):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(special_tokens=["[UNK]"], show_progress=False))
    return backend


def wrapped(backend):
    return HuggingFaceTokenizer("x", backend, 10**6, None, None)


def sentencepiece_model(**options):
    import sentencepiece

    usual = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    usual |= {"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2}
    lines = [line for text in CORPUS for line in text.split("\n") if line]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, **{**usual, **options})
    backend = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    return SentencePieceTokenizer("x", backend, backend.get_piece_size(), 2, 1)


def loss(tokenizer, text):
    return RoundTrip(tokenizer).loss(text, encode(tokenizer, text))


def test_missing_characters_are_counted():
    assert missing("a b a", "a b") == "a " and missing("ab", "ba") == "" and missing("a", "▁a") == ""


def test_what_a_byte_level_tokenizer_gives_back():
    from tokenizers import AddedToken, normalizers

    whole = wrapped(byte_level())
    assert check_round_trip(whole) == "" and loss(whole, "größer\x00 日本\u180e \n") == Loss()
    composed = wrapped(byte_level(normalizer=normalizers.NFC()))
    assert check_round_trip(composed) == "" and loss(composed, "e\u0301 Å") == Loss()
    assert check_round_trip(wrapped(byte_level(normalizer=normalizers.Lowercase()))) == ""
    assert SPACES in check_round_trip(wrapped(byte_level(removing(r"\s"))))
    lossy = wrapped(byte_level(removing(r"\w+", invert=True)))
    assert "leaves out some characters without a token" in check_round_trip(lossy) and loss(lossy, "a, b!").letters == ",!"
    few = wrapped(byte_level(alphabet=False))
    assert (
        "leaves out some characters" in check_round_trip(few)
        and set(loss(few, "the Ψ").lost) & set("Ψ\ufffd")
        and loss(few, "the") == Loss()
    )
    taking = byte_level()
    taking.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])
    assert SPACES in check_round_trip(wrapped(taking)) and loss(wrapped(taking), "a <x> b") == Loss("  ")


def test_letters_of_an_added_token_are_no_bytes():
    backend = byte_level()
    backend.add_tokens(["éé"])
    assert loss(wrapped(backend), "aééb é") == Loss()


def test_what_a_word_piece_tokenizer_gives_back():
    tokenizer = wrapped(word_piece())
    assert SPACES in check_round_trip(tokenizer)
    assert loss(tokenizer, "größer  Self\x00") == Loss("  ") and loss(tokenizer, "Ψ").unknown and not loss(tokenizer, "[UNK]").letters


def test_a_model_that_drops_what_it_does_not_know_is_told_from_one_with_an_unknown_token():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    for unknown in (None, "<unk>"):
        backend = Tokenizer(models.BPE(unk_token=unknown))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [unknown] if unknown else []
        backend.train_from_iterator(["abc abd"], trainers.BpeTrainer(special_tokens=special, show_progress=False))
        found = loss(wrapped(backend), "abc xyz")
        assert (found.letters, found.unknown) == (("", True) if unknown else ("xyz", False))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["<<", "don"]},
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc_cf"},
    ],
)
def test_sentencepiece_gives_back_its_normalized_text(options):
    tokenizer = sentencepiece_model(**options)
    assert check_round_trip(tokenizer) == ""
    assert loss(tokenizer, "größer <<\x00 Ψ▁ <0x41> <unk> \n") == Loss()


def test_sentencepiece_without_bytes_has_an_unknown_token_and_may_join_spaces():
    few = sentencepiece_model(byte_fallback=False, vocab_size=90, character_coverage=0.99)
    assert check_round_trip(few) == "" and loss(few, "the Ψ").unknown and not loss(few, "the").unknown
    assert SPACES in check_round_trip(sentencepiece_model(remove_extra_whitespaces=True))


def test_ids_that_do_not_belong_to_the_text_are_seen():
    for tokenizer in (wrapped(byte_level()), sentencepiece_model()):
        ids = encode(tokenizer, "int a = b; größer")
        assert (
            RoundTrip(tokenizer).loss("int a = b; größer", ids) == Loss()
            and RoundTrip(tokenizer).loss("int a = b; größer", ids[:-2]).letters
        )


def test_added_tokens_that_normalization_makes_the_same_are_refused():
    from tokenizers import AddedToken, normalizers

    backend = byte_level(normalizer=normalizers.Lowercase())
    backend.add_tokens([AddedToken("FOO", normalized=True), AddedToken("foo", normalized=True)])
    with pytest.raises(DataError, match="'FOO' and 'foo' are the same text after normalization"):
        check_round_trip(wrapped(backend))


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory):
    pytest.importorskip("tiktoken")
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    path = tmp_path_factory.mktemp("tiktoken") / "ranks"
    vocabulary = json.loads(byte_level().to_str())["model"]["vocab"]
    lines = [base64.b64encode(bytes(bytes_of[letter] for letter in piece)) + b" %d\n" % rank for piece, rank in vocabulary.items()]
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize(
    ("pattern", "lost"), [(r"\w+", "' '"), (r"\s+|\p{L}+|[^\s\p{L}\p{N}]+", "'1'"), (r"(?!\d)[\s\S]", "'1'"), (r"(?!\s+\n)[\s\S]", r"'\r'")]
)
def test_a_pattern_that_loses_text_is_refused_with_what_it_loses(tiktoken_file, tmp_path, pattern, lost):
    (tmp_path / "a.jsonl").write_text('{"text": "a, b 1"}\n' * 100)
    how = EncodeSettings("TikTokenizer", str(tiktoken_file), tiktoken_pattern=pattern)
    with pytest.raises(DataError, match="--tiktoken-pattern loses text") as raised:
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "x"), how)
    assert lost in raised.value.what and "by its name or as a regular expression" in raised.value.do
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_pattern_that_loses_text_in_a_document_alone_is_refused_too(tiktoken_file, tmp_path, backend):
    pattern = r"(?!☃☃☃)[\s\S]"
    assert check_round_trip(load_tokenizer("TikTokenizer", str(tiktoken_file), tiktoken_pattern=pattern)) == ""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "snow ☃☃☃ men"}) + "\n")
    how = EncodeSettings("TikTokenizer", str(tiktoken_file), tiktoken_pattern=pattern, backend=backend)
    with pytest.raises(DataError, match="loses text, such as '☃': the ids of 'snow ☃☃☃ men' do not give it back"):
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "x"), how)


def test_a_rare_letter_that_a_pattern_loses_is_found_in_any_document(tiktoken_file, tmp_path):
    """Late in one of many long documents, where no sample is compared, and only after a digit, so that the start does not find it."""
    texts = [f"{'plain words only ' * 50}{number}{'丁' * (number == 200)}" for number in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    how = EncodeSettings("TikTokenizer", str(tiktoken_file), tiktoken_pattern=r"[^丁]+|(?<!\d)丁", backend="reference")
    with pytest.raises(DataError, match="loses text, such as '丁': the ids of '…plain words only 200丁' do not give it back"):
        preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "x"), how)


@pytest.mark.parametrize("letter", ["丁", "㐀", "\U00020001", "\ue000", "가"])
def test_a_pattern_that_leaves_out_any_single_character_is_refused_at_the_start(tiktoken_file, letter):
    tokenizer = load_tokenizer("TikTokenizer", str(tiktoken_file), tiktoken_pattern=f"[^{letter}]+")
    with pytest.raises(DataError, match=re.escape(f"loses text, such as {letter!r}")):
        check_round_trip(tokenizer)


def run(backend, tmp_path, texts, overwrite=False, **more):
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    how = EncodeSettings("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json"), **more)
    return preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "x"), how, overwrite=overwrite)


def test_documents_with_lost_text_are_counted(tmp_path):
    summary = run(word_piece(), tmp_path, ["int a", "Ψ self", "the ☃ Ω", " \t", ""])
    assert summary.text_checks == TextChecks(documents=4, compared=4, unknown=2) and (summary.documents, summary.empty) == (3, 2)
    assert summary.text_notes[1].startswith("2 of 4 documents hold characters that the tokenizer does not know")
    assert SPACES in summary.text_notes[0] and json.dumps(summary.to_json())


@pytest.mark.parametrize("kept", [False, True])
def test_a_document_of_which_nothing_is_left_is_not_counted_as_empty(tmp_path, kept):
    summary = run(byte_level(removing(r"\w+", invert=True)), tmp_path, ["the end", "—!", "a, b", " ", ""], keep_empty=kept)
    checks = summary.text_checks
    assert (checks.without_tokens, checks.incomplete, checks.example) == (1, 2, "—!")
    assert (summary.documents, summary.empty, summary.kept_empty) == ((5, 0, 3) if kept else (2, 2, 0))
    assert any("the tokenizer has no token for the text of 1 document, such as '—!'" in note for note in summary.text_notes)


def test_a_run_of_which_nothing_is_left_says_why(tmp_path):
    with pytest.raises(DataError, match="no token for the text of 2 documents"):
        run(byte_level(removing(r"\w+", invert=True)), tmp_path, ["—!", "…"])


def test_every_document_that_loses_letters_is_counted_and_the_loss_is_shown(tmp_path):
    from tokenizers import AddedToken, pre_tokenizers

    for before in (None, pre_tokenizers.ByteLevel(add_prefix_space=True), removing(r"\s")):
        backend = byte_level(before, alphabet=False)
        backend.add_tokens([AddedToken("<é>", lstrip=True, rstrip=True)])
        texts = [f"{'a foo <é> bar self ' * 30}{'Ψ' * (number % 5 == 0)}  a\u00a0" for number in range(100)]
        summary = run(backend, tmp_path, texts, overwrite=True)
        checks = summary.text_checks
        assert (checks.documents, checks.counted, checks.incomplete) == (100, 100, 20)
        assert any(note.startswith("20 of 100 documents hold characters") and "bar self Ψ  a" in note for note in summary.text_notes)


def test_every_document_with_unknown_tokens_is_counted(tmp_path):
    texts = [f"{'a foo [UNK] bar ' * 50}{'Ψ' * (number % 5 == 0)}" for number in range(300)]
    backend = word_piece()
    backend.add_special_tokens(["[UNK]"])
    summary = run(backend, tmp_path, texts)
    assert (summary.text_checks.documents, summary.text_checks.unknown, summary.text_checks.counted) == (300, 60, 0)


def test_where_ids_do_not_stand_for_bytes_they_are_not_counted():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    level, letters = pre_tokenizers.ByteLevel(add_prefix_space=False), byte_letters()
    vocabulary = {letter: number for number, letter in enumerate([*letters, "Ã©"])}

    def counts(before=level, added=(), vocabulary=vocabulary, normalizer=None, **model):
        backend = Tokenizer(models.BPE(vocabulary, [("Ã", "©")] if "Ã©" in vocabulary else [], **model))
        backend.pre_tokenizer = before
        if normalizer is not None:
            backend.normalizer = normalizer
        backend.add_tokens(list(added))
        return make_byte_counts(wrapped(backend)) is not None

    few = {"a": 0, "<unk>": 1}
    assert counts() and counts(vocabulary=few) and counts(added=["日", "Ãx"]) and counts(unk_token="a")
    assert (
        not counts(normalizer=normalizers.NFC())
        and not counts(added=["Ã©"])
        and not counts(added=["é"])
        and not counts(vocabulary=few, unk_token="<unk>")
    )
    assert not counts(vocabulary=few, byte_fallback=True) and not counts(end_of_word_suffix="x") and not counts(pre_tokenizers.Whitespace())
    assert not counts(pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), level])) and not counts(pre_tokenizers.Sequence([level, level]))


def test_ids_that_are_far_apart_are_counted_too():
    sizes = {0: 1, 3: 2, 10**9: 4}
    ids, lengths = np.array([0, 10**9, 3, 3], np.uint32), np.array([2, 0, 2])
    assert ByteCounts(sizes, None).lost(["abcde", "", "aéb"], ids, lengths) == {}
    assert ByteCounts(sizes, None).lost(["abcdef", "é", "aéb"], ids, lengths) == {0: 1, 1: 2}


def test_the_comparison_at_the_start_leaves_no_threads(tmp_path):
    """Workers are forked after it, and one that is forked while other threads run may hang."""
    byte_level_folder = write(tmp_path / "t", byte_level_json())
    environment = {name: value for name, value in os.environ.items() if name not in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")}
    code = "import os; from megatron_patch.tokenizers.base import load_tokenizer as load; "
    code += "from megatron_patch.tokenizers.round_trip import check_round_trip as check; "
    code += f"t = load('HuggingFaceTokenizer', {str(byte_level_folder)!r}); before = len(os.listdir('/proc/self/task')); "
    code += "check(t); print(before, len(os.listdir('/proc/self/task')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    before, after = done.stdout.split()
    assert before == after
