"""The adapter's directions as arrays, for views: read without torch.

Shape legend: N directions, R of one matrix, I input width, O output width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.addresses import ModulePlace, in_columns, rank_addresses
from lorascope.peft_files import Vectors, read_config, read_vectors
from lorascope.study import Study
from lorascope.views.kept import kept_once, stamp

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Directions:
    """An adapter in column order (`addresses.sort_key`), as `lorascope.adapter.Adapter` has it in torch."""

    modules: tuple[ModulePlace, ...]
    vectors: Vectors
    config: dict[str, Any]
    """The PEFT configuration."""

    @cached_property
    def addresses(self) -> list[str]:
        """The N addresses in column order."""
        return [name for m in self.modules for name in rank_addresses(m.layer, m.type, m.rank)]

    def factors(self) -> Iterator[tuple[ModulePlace, Array, Array, float]]:
        """(module, a_RI, b_OR, scale) of each matrix."""
        return ((module, *self.vectors[module.path]) for module in self.modules)

    @cached_property
    def effect_per_scalar(self) -> Array:
        """s·‖b‖ of each direction, float32 [N]: effect = this × scalar."""
        return np.concatenate([scale * np.linalg.norm(b_OR, axis=0) for _, _, b_OR, scale in self.factors()]).astype(
            np.float32
        )

    @property
    def rank(self) -> int:
        """The largest number of directions of one matrix; above 1 single directions depend on the basis."""
        return max(module.rank for module in self.modules)


def open_directions(study: Study) -> Directions | None:
    """The directions of the study's adapter; None before there is one.

    Raises:
        BadInput: its files are damaged.
    """
    folder = study.path / "adapter"
    files = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    if not files[0].is_file():
        return None
    return read_directions(folder, *(stamp(path) if path.is_file() else (0, 0) for path in files))


@kept_once(maxsize=2)
def read_directions(folder: Path, *state: tuple[int, int]) -> Directions:
    """`open_directions` of one state of its files."""
    config = read_config(folder)
    vectors = read_vectors(folder, config)
    modules = in_columns({path: len(a_RI) for path, (a_RI, _, _) in vectors.items()})
    return Directions(tuple(modules), vectors, config)
