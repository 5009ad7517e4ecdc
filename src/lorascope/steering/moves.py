"""What steering does to the scalars: one move per feature, as an edit of the pass or as a shift computed before it.

A direction's polarity is moved where its scalar passes. A latent's code is known only after a pass, so its move is a
shift of all scalars, z ← z + (c′ − c)·W_dec[f], with c from a preceding pass over the same token; what the SAE does
not explain of z stays. Shape legend: B sequences, T tokens, N directions, n directions of one module.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorascope.edits import Edit
from lorascope.errors import BadInput
from lorascope.steering.panel import Panel, Place
from lorascope.store import Floats

MODES = ("add", "scale", "clamp", "off")


@dataclass(frozen=True)
class Steer:
    """What to do to one feature."""

    feature: str
    """`L12.gate+`, `L12.gate-` or `sae.17`."""
    amount: float = 0.0
    """In units of the feature's 99th percentile of firing activations (add, clamp), or a factor (scale)."""
    mode: str = "add"
    """`add` to the activation, `scale` it, `clamp` it to a value on every token, or switch it `off`.

    A polarity is scaled or off only where its own sign is there. `clamp` sets the direction's signed effect, whatever
    it was, so 0 silences both polarities, and a negative amount lets the other fire.
    """


def check_moves(panel: Panel, steers: Sequence[Steer]) -> None:
    """Find out before a model runs whether every feature, mode and unit is there.

    Raises:
        BadInput: an unknown feature or mode, an amount that is not a number, a direction that writes nothing.
        MissingStage: an earlier stage gives the unit or the SAE.
    """
    for steer in steers:
        place = panel.place(steer.feature)
        if steer.mode not in MODES:
            raise BadInput(f"There is no mode {steer.mode!r} of steering; choose from {', '.join(MODES)}.")
        if not np.isfinite(steer.amount):
            raise BadInput(f"The amount for {steer.feature} must be a number, not {steer.amount}.")
        if not place.latent and panel.effect_N[place.number] == 0:
            raise BadInput(f"{steer.feature} writes a vector of length 0, so it cannot be steered.")
        if steer.mode in ("add", "clamp"):
            panel.unit(steer.feature)


def needs_codes(panel: Panel, steers: Sequence[Steer]) -> bool:
    """Whether some latent's move depends on its code, so that a pass without edits has to come first."""
    return any(panel.place(steer.feature).latent and steer.mode != "add" for steer in steers)


def move_edits(panel: Panel, steers: Sequence[Steer], before_TN: Floats | None) -> list[Edit]:
    """The edits of one pass over one sequence, in the order of `steers`.

    Args:
        before_TN: raw scalars of a pass over the same tokens without edits; None where `needs_codes` is false.
    """
    edits = []
    for steer in steers:
        place = panel.place(steer.feature)
        if place.latent:
            edits.append(shift_edit(latent_shift(panel, steer, place, before_TN)))
        else:
            edits.append(direction_edit(panel.addresses[place.number], direction_move(panel, steer, place)))
    return edits


def move_shift(panel: Panel, steers: Sequence[Steer], before_TN: Floats) -> Floats:
    """By how much all moves together change the raw scalars of a pass without edits, float32 [T, N]."""
    shift_TN = np.zeros_like(before_TN)
    for steer in steers:
        place = panel.place(steer.feature)
        if place.latent:
            shift_TN += latent_shift(panel, steer, place, before_TN)
        else:
            z_T = torch.from_numpy(before_TN[:, place.number])
            shift_TN[:, place.number] += (direction_move(panel, steer, place)(z_T) - z_T).numpy()
    return shift_TN


def direction_edit(address: str, move: Callable[[Tensor], Tensor]) -> Edit:
    """One direction's scalars changed where they pass."""
    return Edit(address, lambda z, _: move(z))


def shift_edit(shift: Floats) -> Edit:
    """Add [N] to the scalars of every token, or [T, N] to those of each token of the one sequence."""
    whole = torch.from_numpy(shift)
    placed: dict[torch.device, Tensor] = {}  # moved to a device once, not for every module

    def change(z: Tensor, columns: Tensor) -> Tensor:
        if z.device not in placed:
            placed[z.device] = whole.to(z)
        return z + placed[z.device][..., columns]

    return Edit("*", change, per_sequence=shift.ndim == 2)


def direction_move(panel: Panel, steer: Steer, place: Place) -> Callable[[Tensor], Tensor]:
    """The new raw scalars of a direction from its old ones, for one of its polarities."""
    per_scalar = place.sign * float(panel.effect_N[place.number])  # activation = relu(per_scalar · z)
    if steer.mode in ("scale", "off"):
        factor = steer.amount if steer.mode == "scale" else 0.0
        return lambda z: torch.where(z * per_scalar > 0, z * factor, z)
    change = steer.amount * panel.unit(steer.feature) / per_scalar
    if steer.mode == "clamp":
        return lambda z: torch.full_like(z, change)
    return lambda z: z + change


def latent_shift(panel: Panel, steer: Steer, place: Place, before_TN: Floats | None) -> Floats:
    """(c′ − c)·W_dec[f] in raw units: [N] for `add`, which needs no code, else [T, N]."""
    assert panel.latents is not None  # `place` found a latent
    row_N = panel.latents.W_dec_FN[place.number]
    if steer.mode == "add":
        return (np.float32(steer.amount * panel.unit(steer.feature)) * row_N).astype(np.float32)
    assert before_TN is not None  # `needs_codes` asked for it
    c_T1 = panel.activations([steer.feature], before_TN)
    if steer.mode == "clamp":
        wanted_T1 = np.full_like(c_T1, steer.amount * panel.unit(steer.feature))
    else:
        wanted_T1 = c_T1 * np.float32(steer.amount if steer.mode == "scale" else 0.0)
    return ((wanted_T1 - c_T1) * row_N).astype(np.float32)
