"""The published tokenizer of Stable Diffusion v1: its vocabulary follows from its merges, which are kept compressed."""

import bz2
import json
import shutil
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"


def byte_symbols() -> dict[int, str]:
    """The character that stands for each byte, in the vocabulary's order: printable ones for themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merges() -> list[tuple[str, str]]:
    lines = bz2.decompress((GOLDEN / "merges.txt.bz2").read_bytes()).decode().removesuffix("\n").split("\n")
    return [(first, second) for first, second in (line.split(" ") for line in lines[1:])]


def vocabulary() -> dict[str, int]:
    symbols = byte_symbols().values()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges()), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def write(folder: Path) -> Path:
    """The published folder, or rather its files that count."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_bytes(bz2.decompress((GOLDEN / "merges.txt.bz2").read_bytes()))
    shutil.copy(GOLDEN / "tokenizer_config.json", folder)
    return folder
