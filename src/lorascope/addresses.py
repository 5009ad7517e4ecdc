"""The names of directions: addresses, their order, patterns over them. Nothing here loads torch."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from lorascope.errors import BadInput

SHORT_NAMES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
TYPE_ORDER = {name: i for i, name in enumerate(SHORT_NAMES.values())}
GROUPS = ("attn", "mlp")
READ, WRITE = "read", "write"
ROLES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("q", "k", "v"), ("attn", READ)),
    **dict.fromkeys(("qkv_proj", "query_key_value", "Wqkv", "c_attn"), ("attn", READ)),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), ("attn", READ)),
    **dict.fromkeys(("o", "dense", "out_proj", "attn.c_proj"), ("attn", WRITE)),
    **dict.fromkeys(("gate", "up", "shared_expert_gate"), ("mlp", READ)),
    **dict.fromkeys(("gate_up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h"), ("mlp", READ)),
    **dict.fromkeys(("down", "fc2", "fc_out", "dense_4h_to_h", "mlp.c_proj"), ("mlp", WRITE)),
}
"""The group of a type, and its side of the residual stream. Types that are not here keep the path inside their layer,
which names their group (see `group_of`)."""
BLOCKS = {"attn": ("attn", "attention"), "mlp": ("mlp", "feed_forward", "ffn", "moe", "expert")}
"""What the modules that hold a group's maps have in their names."""
LAYER_PATTERN = re.compile(r"(?:^|\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class ModulePlace:
    """Where the directions of one adapted matrix stand."""

    path: str
    """Module path in the transformers model, e.g. `model.layers.12.mlp.gate_proj`."""
    layer: int | None
    type: str
    columns: slice
    """Its directions among all N columns."""

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.columns.stop - self.columns.start)


def in_columns(ranks: Mapping[str, int]) -> list[ModulePlace]:
    """The places of modules with so many directions each, `{module path: rank}`, in column order (`sort_key`)."""
    located = locate_modules(ranks)
    places, start = [], 0
    for path in sorted(ranks, key=lambda p: sort_key(*located[p])):
        places.append(ModulePlace(path, *located[path], slice(start, start + ranks[path])))
        start += ranks[path]
    return places


def locate_modules(paths: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """`(layer, type)` of each module path. Types that would clash inside a layer keep more of their path."""
    located: dict[str, tuple[int | None, str]] = {}
    for path in paths:
        match = LAYER_PATTERN.search(path)
        located[path] = (int(match[1]), type_of(match[2])) if match else (None, path.rsplit(".", 1)[-1])
    counts: dict[tuple[int | None, str], int] = {}
    for place in located.values():
        counts[place] = counts.get(place, 0) + 1
    for path, place in located.items():
        if counts[place] > 1:
            match = LAYER_PATTERN.search(path)
            located[path] = (place[0], match[2] if match else path)
    return located


def type_of(path: str) -> str:
    """The type of a module by its path inside a layer: its short or known name, else the path.

    A known name is kept bare only where its parents do not speak against its group: `c_proj` is in both of GPT-2's
    blocks, and Mamba's `out_proj` in none.
    """
    parents, _, last = path.rpartition(".")
    if last in SHORT_NAMES:
        return SHORT_NAMES[last]
    return last if last in ROLES and (not parents or block_of(parents) == ROLES[last][0]) else path


def block_of(parents: str) -> str | None:
    """The group that the modules of a path belong to, None where it does not say."""
    return next((group for group, names in BLOCKS.items() if any(name in parents for name in names)), None)


def group_of(type_: str) -> str | None:
    """`attn` or `mlp` for the type of a linear map in such a block, else None."""
    return ROLES[type_][0] if type_ in ROLES else block_of(type_.rpartition(".")[0])


def side_of(type_: str) -> str | None:
    """What a type does to the residual stream: `read` it, `write` to it, or (None) neither or unknown."""
    last = type_.rsplit(".", 1)[-1]
    return ROLES.get(type_, ROLES.get(SHORT_NAMES.get(last, last), (None, None)))[1]


def sort_key(layer: int | None, type_: str) -> tuple[float, int, str]:
    """The column order: layer (modules outside layers last), then q k v o gate up down, then others by name."""
    return (math.inf if layer is None else layer, TYPE_ORDER.get(type_, len(TYPE_ORDER)), type_)


def address_of(layer: int | None, type_: str) -> str:
    """`L12.gate`, or the bare name for a module outside the layers."""
    return type_ if layer is None else f"L{layer}.{type_}"


def rank_addresses(layer: int | None, type_: str, rank: int) -> list[str]:
    """The addresses of one matrix's directions: `L12.gate`, or `L12.gate#0`, `L12.gate#1` at rank above 1."""
    name = address_of(layer, type_)
    return [name] if rank == 1 else [f"{name}#{r}" for r in range(rank)]


def direction_layer(address: str) -> int | None:
    """The layer of an address, None outside the layers."""
    match = re.match(r"L(\d+)\.", address)
    return int(match[1]) if match else None


def direction_type(address: str) -> str:
    """The type of an address: `gate` for `L12.gate#1`."""
    return re.sub(r"^L\d+\.", "", address).split("#")[0]


def matches(address: str, pattern: str) -> bool:
    """Whether an address matches one fnmatch pattern: the address itself, without its `#rank`, or its bare type.

    `attn` and `mlp` stand for all types of the group: `L4*.mlp`.
    """
    type_ = direction_type(address)
    layers, _, last = pattern.rpartition(".")
    if last in GROUPS:
        return group_of(type_) == last and fnmatchcase(address.split(".")[0], layers or "L*")
    return any(fnmatchcase(name, pattern) for name in (address, address.split("#")[0], type_))


def select(addresses: Sequence[str], patterns: str | Sequence[str]) -> NDArray[np.bool_]:
    """Which addresses match any of the patterns, bool [N]. Commas split a string of patterns.

    `L3.q` also selects `L3.q#0`, `L3.q#1`, …; `gate` selects that type in every layer; `attn` and `mlp` are groups.

    Raises:
        BadInput: a pattern matches nothing.
    """
    given = patterns.split(",") if isinstance(patterns, str) else list(patterns)
    chosen = np.zeros(len(addresses), dtype=bool)
    for pattern in (text.strip() for text in given):
        hits = np.array([matches(address, pattern) for address in addresses], dtype=bool)
        if not hits.any():
            shown = ", ".join(list(addresses)[:3])
            raise BadInput(f"The pattern {pattern!r} matches no direction; addresses look like {shown}.")
        chosen |= hits
    return chosen


def parse_layers(text: str, count: int) -> set[int]:
    """Layer numbers from `12`, `0-9`, `0-29:3`, an fnmatch pattern (`*`, `2[0-9]`, `1?`) or a comma list of these.

    Raises:
        BadInput: it is none of these, or chooses a layer that the model does not have.
    """
    numbers: set[int] = set()
    for part in (p.strip() for p in text.split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if match:
            first, last = int(match[1]), int(match[2] or match[1])
            numbers |= set(range(first, last + 1, max(1, int(match[3] or 1))))
        elif set(part) & set("*?["):
            hits = {n for n in range(count) if fnmatchcase(str(n), part)}
            if not hits:
                raise BadInput(f"The model has layers 0-{count - 1}; no layer matches {part!r}.")
            numbers |= hits
        else:
            raise BadInput(f"{part!r} is not a layer choice; use *, 12, 0-9, 0-29:3, 2[0-9] or a comma list of these.")
    if outside := sorted(n for n in numbers if n >= count):
        raise BadInput(f"The model has layers 0-{count - 1}; there is no layer {outside[0]}.")
    return numbers
