"""Configurations as diffusers and transformers publish them: config.json files as frozen dataclasses, whose fields have the names there.

What a network cannot be built from is refused where the configuration is made, in one line that names the field, its value and what
would do; and so is what no network has, so that a damaged file costs no memory.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

# What a damaged file may not exceed: layers are made one by one, and there are as many weights as products of widths.
_LARGEST = 2**20
_LONGEST = 16
_MOST = {"layers_per_block": 16, "num_hidden_layers": 128}
_LEVELS = ("block_out_channels", "down_block_types", "up_block_types")


def read_fields(kind: type[Any], fields: Mapping[str, Any], *, records: Collection[str] = ()) -> dict[str, Any]:
    """The arguments of the dataclass `kind` in a parsed config.json.

    Names that begin with an underscore, and `records`, are a library's own record-keeping and say nothing about the network.

    Raises: ValueError for an unknown field, naming the nearest known one.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    given = {}
    for name, value in fields.items():
        if name.startswith("_") or name in records:
            continue
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            raise ValueError(f"config.json: unknown field {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
        given[name] = tuple(value) if isinstance(value, list) else value
    return given


def check_class(fields: Mapping[str, Any], name: str) -> None:
    """Raise a ValueError if a parsed config.json says that it is of another class."""
    found = fields.get("_class_name", name)
    if found != name:
        raise ValueError(f"config.json describes a {found!r}, not {'an' if name[0] in 'AEIO' else 'a'} {name}")


def check_fields(config: Any, *, allowed: Mapping[str, tuple[Any, ...]], positive: Collection[str]) -> None:
    """Raise a ValueError unless every field of a configuration is of its type and a size that a network can have.

    Args:
        config: a dataclass.
        allowed: all that some fields may be; a published configuration that asks for something else is refused.
        positive: the names of fields that must be positive, where they are not None.
    """
    for name, values in allowed.items():
        value = getattr(config, name)
        if value not in values:
            raise ValueError(f"{name} = {value!r} is not supported; what is: {', '.join(map(repr, values))}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, field.type):
            kind = field.type.__name__ if isinstance(field.type, type) else field.type
            raise ValueError(f"{field.name} = {value!r} must be {kind}")
        if isinstance(value, tuple) and len(value) > _LONGEST:
            raise ValueError(f"{field.name} has {len(value)} entries: at most {_LONGEST} are supported")
        for number in value if isinstance(value, tuple) else (value,):
            most = _MOST.get(field.name, _LARGEST)
            if isinstance(number, int) and abs(number) > most:
                raise ValueError(f"{field.name} = {value!r} is not supported: at most {most}")
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{field.name} = {value!r} must be finite")
        if field.name in positive and value is not None and not value > 0:
            raise ValueError(f"{field.name} = {value!r} must be positive")


def check_levels(config: Any, *, down: Collection[str], up: Collection[str], divisors: Collection[str] = ("norm_num_groups",)) -> None:
    """Raise a ValueError unless there are blocks of known types for each level, as many channels, and those divisible.

    Args:
        config: a dataclass that `check_fields` has passed.
        down: all that `down_block_types` may hold.
        up: all that `up_block_types` may hold.
        divisors: the names of fields of which `block_out_channels` must hold multiples.
    """
    for name, known in (("down_block_types", down), ("up_block_types", up)):
        for value in getattr(config, name):
            if value not in known:
                raise ValueError(f"{name} holds {value!r}, which is not supported; what is: {', '.join(map(repr, known))}")
    lengths = [len(getattr(config, name)) for name in _LEVELS]
    if lengths[0] == 0 or len(set(lengths)) != 1:
        names = f"{', '.join(_LEVELS[:-1])} and {_LEVELS[-1]}"
        raise ValueError(f"{names} must be equally many, one or more: got {lengths[0]}, {lengths[1]} and {lengths[2]}")
    for channels in config.block_out_channels:
        for name in divisors:
            if channels < 1 or channels % getattr(config, name):
                raise ValueError(f"block_out_channels holds {channels!r}: not a multiple of {name} = {getattr(config, name)}")


def check_share(config: Any, name: str) -> None:
    """Raise a ValueError unless this field is at least 0 and below 1."""
    if not 0 <= getattr(config, name) < 1:
        raise ValueError(f"{name} = {getattr(config, name)!r} must be at least 0 and below 1")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a parsed JSON value is of an annotated type; true and false are no numbers."""
    if kind is None:
        return value is None
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, tuple):
            return False
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
