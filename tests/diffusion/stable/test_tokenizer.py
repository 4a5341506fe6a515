"""The tokenizer: transformers' tokens (golden file), an oracle that shares no code with it, what is cut, folders that do not do."""

import hashlib
import itertools
import json
import shutil
import unicodedata
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from diffusion.stable.tokenizer import Tokenizer, read_tokenizer
from tests.diffusion.stable.prompts import BLOCKS, CURIOUS, prompts
from tests.diffusion.stable.vocabulary import GOLDEN, byte_symbols, merges, vocabulary, write


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write(tmp_path_factory.mktemp("published") / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(published):
    return read_tokenizer(published)


@pytest.fixture(scope="module")
def oracle():
    """Radford et al.'s algorithm, written down from its description: the tokens of a prompt without begin and end, all of them."""
    numbers, symbols = vocabulary(), byte_symbols()
    ranks = {pair: rank for rank, pair in enumerate(merges())}
    white = {*map(chr, (*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000))}

    def kind(character):
        return " " if character in white else category if (category := unicodedata.category(character)[0]) in "LN" else "other"

    def pieces(text):
        while text:
            suffix = next((s for s in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(s)), "")
            first = kind(text[0])
            length = len(suffix) or (1 if first in " N" else next((i for i, c in enumerate(text) if kind(c) != first), len(text)))
            if first != " ":
                yield text[:length]
            text = text[length:]

    def merged(piece):
        parts = [symbols[byte] for byte in piece.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part  # which is longer than the pair's first part: not joined again in this round
                else:
                    joined.append(part)
            parts = joined
        return parts

    def tokens(prompt):
        text = "".join(c.lower() for c in unicodedata.normalize("NFC", prompt))
        return [numbers[part] for piece in pieces(text) for part in merged(piece)]

    return tokens


def padded(tokens):
    return [49406, *tokens[:75], *[49407] * (76 - len(tokens[:75]))]


def test_the_vocabulary_is_the_published_one():
    numbers = vocabulary()
    assert len(numbers) == 49408
    # Of the tokens in order, as published.
    digest = hashlib.sha256("\n".join(sorted(numbers, key=numbers.__getitem__)).encode()).hexdigest()
    assert digest == "7cccc44d334555d1ff3c0ac5f0246b428fab2918383e77ee745cf30d41010b78"


def test_tokens_are_those_of_transformers(tokenizer):
    pairs = json.loads((GOLDEN / "prompts.json").read_text())
    assert [prompt for prompt, _ in pairs][: len(CURIOUS)] == list(CURIOUS)
    found = tokenizer([prompt for prompt, _ in pairs]).ids
    assert found.shape == (300, 77)
    assert found.dtype == np.int32
    for row, (prompt, expected) in zip(found, pairs, strict=True):
        assert list(row) == expected + [49407] * (77 - len(expected)), repr(prompt)


def test_a_prompt_by_hand(tokenizer):
    """A cat and a dog of the published examples; entities and the wrong characters are not mended."""
    ids = tokenizer(["a photo of a cat", "&amp;", "A  PHOTO\nOF a Cat "]).ids
    assert list(ids[0]) == padded([320, 1125, 539, 320, 2368])
    assert list(ids[2]) == list(ids[0])
    numbers = vocabulary()
    assert list(ids[1]) == padded([numbers["&</w>"], numbers["amp</w>"], numbers[";</w>"]])


SPECIAL = ("<|startoftext|>", "<|endoftext|>")
characters = st.one_of(*(st.characters(min_codepoint=first, max_codepoint=last) for first, last in BLOCKS))


@hypothesis.given(
    st.lists(st.one_of(st.text(characters), st.sampled_from(("'S", "'re", "'LL", "&amp;", "Café", "cafe\u0301", "ΟΔΟΣ", "İ", "  ")))).map(
        "".join
    )
)
def test_tokens_are_those_of_the_algorithm(tokenizer, oracle, prompt):
    assert list(tokenizer([prompt]).ids[0]) == padded(oracle(prompt))


def test_curious_prompts_have_the_tokens_of_the_algorithm(tokenizer, oracle):
    plain = [prompt for prompt in CURIOUS if not any(special in prompt.lower() for special in SPECIAL)]
    for prompt, row in zip(plain, tokenizer(plain).ids, strict=True):
        assert list(row) == padded(oracle(prompt)), repr(prompt)


def test_what_is_cut_is_told(tokenizer):
    fits, one_more, long = "a " * 75, "a " * 75 + "Dog ", "Ein Bild " * 100
    tokens = tokenizer([fits, one_more, "", long])
    assert tokens.cut[:3] == ("", "Dog ", "")
    assert list(tokens.ids[1]) == [49406, *[320] * 75, 49407]
    assert long.endswith(tokens.cut[3])
    first, second = tokens.warnings
    assert first == "prompt 2 is longer than the 75 tokens that the text encoder takes; not used: 'Dog '"
    assert first.count("\n") == second.count("\n") == 0
    assert second.startswith("prompt 4 is")


# A token each, in more or fewer characters and bytes than the token has.
WORDS = ("a", "Photo", "cafe\u0301", "café", "👍", "U\u0308", "7", "!!!")


@hypothesis.given(st.lists(st.sampled_from(WORDS), max_size=90), st.sampled_from((" ", "  ", "\n\t", "\u3000")))
def test_what_is_cut_is_the_end_of_the_prompt_as_it_was_written(tokenizer, oracle, words, space):
    assert [len(oracle(word)) for word in WORDS] == [1] * len(WORDS)
    (cut,) = tokenizer([space.join(words)]).cut
    assert cut == space.join(words[75:])


def test_another_length(published):
    short = read_tokenizer(published, length=5)(["a photo of a cat"])
    assert list(short.ids[0]) == [49406, 320, 1125, 539, 49407]
    assert short.cut == ("a cat",)


def test_a_folder_as_transformers_5_writes_it(published, tokenizer, tmp_path):
    model = {"type": "BPE", "vocab": vocabulary(), "merges": [list(pair) for pair in merges()]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}))
    np.testing.assert_array_equal(read_tokenizer(tmp_path)(CURIOUS).ids, tokenizer(CURIOUS).ids)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model | {"merges": [f"{a} {b}" for a, b in merges()]}}))
    np.testing.assert_array_equal(read_tokenizer(tmp_path)(CURIOUS).ids, tokenizer(CURIOUS).ids)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(ValueError, match="holds no merges"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vocab.json", None, "cannot read vocab.json"),
        ("merges.txt", None, "cannot read merges.txt"),
        (
            "merges.txt",
            lambda text: text.replace("\nt h\n", "\nt h e\n", 1),
            r"merges.txt: merge 2 is not a pair of tokens: \['t', 'h', 'e'\]",
        ),
        ("merges.txt", lambda text: text + "zzzz qqqq\n", "merges do not fit the vocabulary: .*`qqqq`"),
        ("vocab.json", lambda text: text[:-10], "vocab.json is not JSON"),
        ("vocab.json", lambda text: text.replace(": 7,", ': "7",', 1), "must give every token a whole number"),
        ("vocab.json", lambda text: text.replace(": 7,", ": 8,", 1), "must be numbered from 0, each once"),
        ("vocab.json", lambda text: text.replace('"<|endoftext|>"', '"<e>"'), r"lacks 1 of the tokens .* <\|endoftext\|> among them"),
        ("vocab.json", lambda text: text.replace('"<|startoftext|>"', '"<s>"'), r"lacks 1 of the tokens .* <\|startoftext\|> among them"),
        (
            "vocab.json",
            lambda text: text.replace(": 49406", ": -1").replace(": 49407", ": 49406").replace(": -1", ": 49407"),
            "last token must be <|endoftext|>",
        ),
        ("tokenizer_config.json", lambda text: text.replace('"CLIPTokenizer"', '"T5Tokenizer"'), "tokenizer_class = 'T5Tokenizer' is not"),
        ("tokenizer_config.json", lambda text: text.replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"'), "pad_token = '!' is not"),
        ("tokenizer_config.json", lambda text: text.replace('"do_lower_case": true', '"do_lower_case": false'), "do_lower_case = False"),
    ],
)
def test_folders_that_do_not_do_are_refused_in_one_line(published, tmp_path, file, change, message):
    folder = Path(shutil.copytree(published, tmp_path / "tokenizer"))
    if change is None:
        (folder / file).unlink()
    else:
        before = (folder / file).read_text(encoding="utf-8")
        (folder / file).write_text(change(before), encoding="utf-8")
        assert (folder / file).read_text(encoding="utf-8") != before
    with pytest.raises(ValueError, match=message) as caught:
        read_tokenizer(folder)
    assert "\n" not in str(caught.value)


def plain(added):
    """As transformers 4 and 5 write down the tokens that every CLIP vocabulary has, and more."""
    tokens = {49406: "<|startoftext|>", 49407: "<|endoftext|>", **dict(enumerate(added, 49408))}
    entries = {number: {"content": token, "special": number < 49408} for number, token in tokens.items()}
    return {
        "added_tokens.json": {token: number for number, token in tokens.items()},
        "tokenizer_config.json": {"added_tokens_decoder": entries},
        "tokenizer.json": {"added_tokens": [{"id": number} | entry for number, entry in entries.items()]},
        "vocab.json": vocabulary() | {token: number for number, token in enumerate(added, 49408)},
    }


@pytest.mark.parametrize("file", plain([]))
def test_tokens_that_were_added_are_named(published, tmp_path, file):
    folder = Path(shutil.copytree(published, tmp_path / "tokenizer"))
    (folder / file).write_text(json.dumps(plain([])[file]))
    assert list(read_tokenizer(folder)(["a"]).ids[0, :3]) == [49406, 320, 49407]
    for added, named in ((["<toy>"], "'<toy>'"), ([f"<{i}>" for i in range(7)], "'<0>', '<1>', '<2>', '<3>', '<4>' and 2 more")):
        (folder / file).write_text(json.dumps(plain(added)[file]))
        with pytest.raises(ValueError, match=f"{file}: added tokens are not supported: {named}$"):
            read_tokenizer(folder)


def test_a_blank_last_line_of_merges_is_no_merge(published, tokenizer, tmp_path):
    folder = Path(shutil.copytree(published, tmp_path / "tokenizer"))
    with (folder / "merges.txt").open("a") as file:
        file.write("\n\n")
    np.testing.assert_array_equal(read_tokenizer(folder)(CURIOUS).ids, tokenizer(CURIOUS).ids)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"^prompts = None must be a sequence of strings$"):
        tokenizer(None)
    with pytest.raises(ValueError, match=r"^prompt 2 is None, not a string$"):
        tokenizer(["fine", None])
    with pytest.raises(ValueError, match="prompt 2 is not text: half a surrogate pair at character 3"):
        tokenizer(["fine", "ab\ud83d"])
    with pytest.raises(ValueError, match="put it into a list"):
        tokenizer("a cat")
    with pytest.raises(ValueError, match="length = 2 must be at least 3"):
        Tokenizer(vocabulary(), merges(), length=2)
    assert tokenizer([]).ids.shape == (0, 77)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tokens_are_those_of_transformers_here(published, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(published)
    texts = list(prompts(12_000, seed=1))
    expected = theirs(texts, padding="max_length", truncation=True, max_length=77).input_ids
    differing = [text for text, row, other in zip(texts, tokenizer(texts).ids, expected, strict=True) if list(row) != other]
    assert not differing, f"{len(differing)} of {len(texts)}, the first: {differing[0]!r}"
