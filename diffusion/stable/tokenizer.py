r"""CLIP's tokenizer: prompts to the tokens that transformers' CLIPTokenizer gives them.

Characters are composed (NFC), runs of white space are one space, and letters are lower case, each by itself: Σ is σ at the end of a word
too. Words, digits one by one, and runs of other characters are then spelt in bytes and merged in pairs, a word's last byte marked </w>.
That is all: HTML entities and text decoded in the wrong way stay as they are. (OpenAI's first tokenizer mended both with ftfy;
transformers does not since version 5, nor did its tokenizer in Rust before.)
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from diffusion.weights import read_json

BEGIN = "<|startoftext|>"
END = "<|endoftext|>"  # which also fills prompts up

_VOCABULARY = "vocab.json"
_MERGES = "merges.txt"
_WHOLE = "tokenizer.json"  # vocabulary and merges in one, as transformers 5 writes them
_SETTINGS = "tokenizer_config.json"
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# What tokenizer_config.json may say.
_ALLOWED = {
    "tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "do_lower_case": (True,),
    "add_prefix_space": (False,),
    "bos_token": (BEGIN,),
    "eos_token": (END,),
    "pad_token": (END,),
    "unk_token": (END,),
}


def _contents(tokens: Any) -> list[Any]:
    """Of a list of tokens, or of numbers with their tokens."""
    entries = tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ()
    return [entry.get("content") for entry in entries if isinstance(entry, dict)]


def _after_the_end(vocabulary: Mapping[str, Any]) -> list[str]:
    end = vocabulary.get(END)
    return [token for token, number in vocabulary.items() if isinstance(end, int) and isinstance(number, int) and number > end]


# Where transformers writes down tokens that were added, and which those are.
_ADDITIONS: dict[str, Callable[[dict[str, Any]], Iterable[Any]]] = {
    "added_tokens.json": lambda fields: fields,
    _SETTINGS: lambda fields: _contents(fields.get("added_tokens_decoder")),
    _WHOLE: lambda fields: _contents(fields.get("added_tokens")),
    _VOCABULARY: _after_the_end,
}


class Tokens(NamedTuple):
    """The tokens of prompts, and of each prompt the end that was cut off, "" if it fits."""

    ids: Int[np.ndarray, "n l"]
    cut: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for each prompt that was cut."""
        return tuple(
            f"prompt {number} is longer than the {self.ids.shape[1] - 2} tokens that the text encoder takes; not used: {cut!r}"
            for number, cut in enumerate(self.cut, 1)
            if cut
        )


class Tokenizer:
    """Prompts to tokens, `length` of them for each: begin, at most length − 2 of the prompt, end, and end again to fill it up.

    Raises: ValueError for a vocabulary or merges that are not CLIP's in kind, or a length that leaves no room for a prompt.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]], *, length: int = 77) -> None:
        if length < 3:
            raise ValueError(f"length = {length} must be at least 3: begin, a token, end")
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError(f"the {len(vocabulary)} tokens of the vocabulary must be numbered from 0, each once")
        symbols = [byte + end for byte in pre_tokenizers.ByteLevel.alphabet() for end in ("", "</w>")]
        lost = [token for token in (*sorted(symbols), BEGIN, END) if token not in vocabulary]
        if lost:
            raise ValueError(f"the vocabulary lacks {len(lost)} of the tokens that every CLIP vocabulary has, {lost[0]} among them")
        # The text encoder finds a prompt's end by its being the largest.
        if vocabulary[END] != len(vocabulary) - 1:
            raise ValueError(f"the vocabulary's last token must be {END}")
        try:
            model = models.BPE(vocab=dict(vocabulary), merges=list(merges), unk_token=END, end_of_word_suffix="</w>")
        except Exception as error:  # its errors have no class of their own
            raise ValueError(f"merges do not fit the vocabulary: {error}") from error
        self._encode = tokenizers.Tokenizer(model)
        self._encode.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._encode.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        # A prompt may spell these out; the end alone must be in lower case, as the published settings have it.
        self._encode.add_special_tokens([AddedToken(BEGIN, normalized=True), AddedToken(END, normalized=False)])
        self._begin, self._end = vocabulary[BEGIN], vocabulary[END]
        self.length = length

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """The tokens of each prompt, int32, and what was cut off.

        Raises: ValueError for half a surrogate pair in a prompt, or anything but a sequence of strings.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a sequence of strings, not one string: put it into a list")
        if not isinstance(prompts, Iterable):
            raise ValueError(f"prompts = {prompts!r} must be a sequence of strings")
        prompts = list(prompts)
        ids = np.full((len(prompts), self.length), self._end, np.int32)
        ids[:, 0] = self._begin
        room = self.length - 2
        cut = []
        for row, (number, prompt) in zip(ids, enumerate(prompts, 1), strict=True):
            if not isinstance(prompt, str):
                raise ValueError(f"prompt {number} is {prompt!r}, not a string")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"prompt {number} is not text: half a surrogate pair at character {error.start + 1}") from error
            encoding = self._encode.encode(prompt, add_special_tokens=False)
            kept = encoding.ids[:room]
            row[1 : 1 + len(kept)] = kept
            cut.append(prompt[encoding.offsets[room][0] :] if len(encoding.ids) > room else "")
        return Tokens(ids, tuple(cut))


def read_tokenizer(folder: str | os.PathLike[str], *, length: int = 77) -> Tokenizer:
    """The tokenizer in a folder of transformers: vocab.json and merges.txt, or tokenizer.json; `length` as for `Tokenizer`.

    Raises: ValueError in one line if a file is missing, damaged, or of another kind of tokenizer, or if tokens were added.
    """
    folder = Path(folder)
    refuse_added_tokens(folder)
    if (folder / _SETTINGS).is_file():
        settings = read_json(folder / _SETTINGS)
        for name, allowed in _ALLOWED.items():
            value = settings.get(name, allowed[0])
            value = value.get("content") if isinstance(value, dict) else value
            if value not in allowed:
                raise ValueError(f"{folder / _SETTINGS}: {name} = {value!r} is not supported; what is: {', '.join(map(repr, allowed))}")
    if (folder / _WHOLE).is_file() and not (folder / _VOCABULARY).is_file():
        source = folder / _WHOLE
        model = read_json(source).get("model")
        vocabulary, lines = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
        if not isinstance(lines, list):
            raise ValueError(f"{source} holds no merges of pairs of tokens")
        pairs = [line.split(" ") if isinstance(line, str) else line for line in lines]
    else:
        source = folder / _MERGES
        vocabulary = read_json(folder / _VOCABULARY)
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder} is no folder of a tokenizer: cannot read {_MERGES} ({error})") from error
        # By line feeds alone: some tokens hold other characters that end lines. The first line may name the format's version.
        pairs = [line.split(" ") for line in text.rstrip("\n").split("\n") if not line.startswith("#version")]
    if not isinstance(vocabulary, dict) or not all(isinstance(number, int) for number in vocabulary.values()):
        raise ValueError(f"{folder}: the vocabulary must give every token a whole number")
    merges = []
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) and token for token in pair):
            raise ValueError(f"{source}: merge {number} is not a pair of tokens: {pair!r}")
        merges.append((pair[0], pair[1]))
    try:
        return Tokenizer(vocabulary, merges, length=length)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def refuse_added_tokens(folder: Path) -> None:
    """Raise a ValueError that names them if a folder of transformers has tokens beyond CLIP's, as textual inversion adds them."""
    for name, tokens_in in _ADDITIONS.items():
        if not (folder / name).is_file():
            continue
        added = sorted({str(token) for token in tokens_in(read_json(folder / name))} - {BEGIN, END})
        if added:
            more = f" and {len(added) - 5} more" if len(added) > 5 else ""
            raise ValueError(f"{folder / name}: added tokens are not supported: {', '.join(map(repr, added[:5]))}{more}")
