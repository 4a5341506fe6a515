"""Makes the golden file of the tokenizer with transformers: `python -m tests.diffusion.stable.golden.make_tokenizer FOLDER`.

FOLDER is the tokenizer's of Stable Diffusion v1: vocab.json, merges.txt and tokenizer_config.json. tokenizer/prompts.json then pairs each
prompt with its tokens, as far as the one that ends it. Beside it are the published merges, compressed, and settings: both are part of
OpenAI's CLIP (MIT licence, Copyright (c) 2021 OpenAI).
"""

import json
import sys
from pathlib import Path

from transformers import CLIPTokenizer

from tests.diffusion.stable.prompts import prompts

COUNT = 300
FILE = Path(__file__).parent / "tokenizer" / "prompts.json"


def main(folder: str) -> None:
    """Write it."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    pairs = [(prompt, tokenizer(prompt, truncation=True, max_length=77).input_ids) for prompt in prompts(COUNT, seed=0)]
    FILE.write_text("[\n" + ",\n".join(json.dumps(pair, separators=(",", ":")) for pair in pairs) + "\n]\n", encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1])
