"""Encoding as transformers does, and text that appears token by token without broken characters."""

import json

import pytest
from qlora_runtime.errors import MissingFileError, TokenizerError
from qlora_runtime.tokenizer import TextTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from .tiny import TEXT, VOCAB_SIZE

TEXTS = [
    "plain words",
    " spaces  before and  after ",
    "naïve café, größer",
    "漢字とかな",
    "a👍🏽b👩‍👩‍👧c",
    "\N{REPLACEMENT CHARACTER} is a character too",
    "tab\tline\nend\n",
    "",
]


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory) -> TextTokenizer:
    """As Llama 2 has it: spaces are U+2581, decoding drops the first, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [
        "\u2581",
        *sorted(set(TEXT) - {" ", "\n"}),
        *sorted({f"\u2581{word[0]}" for word in TEXT.split()}),
    ]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("\u2581", piece[1]) for piece in vocabulary if len(piece) == 2 and piece[0] == "\u2581"]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    path = tmp_path_factory.mktemp("llama2") / "tokenizer.json"
    tokenizer.save(str(path))
    return TextTokenizer(path, vocab_size=1000)


def streamed(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_and_decoding_equal_transformers(bundle, tiny, text):
    ids = bundle.tokenizer.encode(text)
    assert ids == tiny.tokenizer(text).input_ids
    assert bundle.tokenizer.decode(ids) == tiny.tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_the_text(bundle, sentencepiece_like, text):
    for tokenizer in (bundle.tokenizer, sentencepiece_like):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == text


def test_characters_appear_whole(bundle):
    ids = bundle.tokenizer.encode("👍漢")
    assert len(ids) == 7  # four bytes and three
    assert streamed(bundle.tokenizer, ids) == ["", "", "", "👍", "", "", "漢", ""]


def test_a_character_cut_short_becomes_one_replacement_at_the_end(bundle):
    ids = bundle.tokenizer.encode("a👍")[:-1]
    assert streamed(bundle.tokenizer, ids) == ["a", "", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_are_left_out_and_spaces_stay(sentencepiece_like):
    encode = sentencepiece_like.encode
    ids = [*encode("the"), 1, *encode("sea"), 1, *encode("ran")]
    assert "".join(streamed(sentencepiece_like, ids)) == sentencepiece_like.decode(ids) == "the sea ran"


def test_every_sequence_of_bytes_streams_to_its_decoding(bundle):
    """Random tokens, most of them no valid UTF-8 together."""
    from .tiny import random_ids

    for seed in range(50):
        ids = random_ids(seed, 30).tolist()
        assert "".join(streamed(bundle.tokenizer, ids)) == bundle.tokenizer.decode(ids)


def test_truncation_and_padding_saved_by_training_are_undone(tiny, tmp_path):
    tokenizer = Tokenizer.from_file(str(tiny.folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer(tmp_path / "tokenizer.json", VOCAB_SIZE)
    assert loaded.encode(TEXT) == tiny.tokenizer(TEXT).input_ids


def test_a_tokenizer_of_a_larger_model_is_refused(tiny):
    with pytest.raises(TokenizerError, match="ids up to 319, the model's go up to 299"):
        TextTokenizer(tiny.folder / "tokenizer.json", vocab_size=300)


def test_files_that_are_no_tokenizers_are_refused(tmp_path):
    with pytest.raises(MissingFileError, match="is missing"):
        TextTokenizer(tmp_path / "tokenizer.json", VOCAB_SIZE)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        TextTokenizer(tmp_path / "tokenizer.json", VOCAB_SIZE)
