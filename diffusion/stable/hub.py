"""Where a pipeline is: a folder, or a name on the Hugging Face hub, whose files are then downloaded once into its cache.

Only numbers and text are asked for: safetensors, .json and .txt of the networks, the tokenizer and the scheduler. The hub needs the extra
`hopjax[hub]`, which is not imported for a folder.
"""

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from diffusion.pipeline import INDEX, existing_folder
from diffusion.weights import refuse_single_file

_NETWORKS = ("text_encoder", "unet", "vae")
_PATTERNS = (
    INDEX,
    "scheduler/*.json",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    *(f"{network}/*.{ending}" for network in _NETWORKS for ending in ("json", "safetensors")),
)
# Not the weights in all their other forms that repositories hold besides: pickles, single files, averages apart; nor half precision, if
# there is another.
_HALF = "*.fp16*"
_IGNORED = ("*.non_ema*",)
# owner/name, of the characters that the hub allows.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Names that are gone → where the same files are now.
_MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}


def resolve(place: str | os.PathLike[str]) -> Path:
    """The folder that `place` is, or the local copy of what the hub has under that name.

    What is there is a folder; so is what would be in a folder that is there (a misspelt path is not looked for on the hub).

    Raises: ValueError in one line if there is neither, it is a checkpoint in one file, the extra is missing, or the hub cannot be reached
        and has not been before.
    """
    folder = Path(place)
    if folder.is_file():
        refuse_single_file(folder)
    if folder.exists() or not isinstance(place, str) or not _NAME.fullmatch(place) or folder.parent.exists():
        return existing_folder(folder)
    if place in _MOVED:
        raise ValueError(f"{place} is gone from the hub: its files are now at {_MOVED[place]}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{place} is not a folder here; to look for it on the Hugging Face hub, install the extra: pip install 'hopjax[hub]'"
        ) from error
    try:
        found = Path(huggingface_hub.snapshot_download(place, allow_patterns=list(_PATTERNS), ignore_patterns=[_HALF, *_IGNORED]))
        if halved := [network for network in _NETWORKS if not _whole(found / network)]:
            halves = [f"{network}/{_HALF}.{ending}" for network in halved for ending in ("json", "safetensors")]
            huggingface_hub.snapshot_download(place, allow_patterns=halves, ignore_patterns=list(_IGNORED))
    except Exception as error:  # of the hub, of the network below it, of the disk: a dozen classes without a common one
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{place} is not a folder here, and the Hugging Face hub does not give it: {reason[0]}") from error
    if not (found / INDEX).is_file():
        raise ValueError(f"{place} on the Hugging Face hub is no pipeline of diffusers: it has no {INDEX}")
    return found


def _whole(folder: Path) -> bool:
    """Whether there are weights of full precision."""
    return any(not fnmatch(file.name, _HALF) for file in folder.glob("*.safetensors"))
