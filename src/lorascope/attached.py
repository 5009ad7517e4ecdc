"""An adapter on a live model: every scalar can be read and edited; leaving restores the base bit for bit.

Shapes: B = sequences, T = tokens, N = directions, R = directions of one module, D = model width, V = vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorascope.adapter import AdaptedModule, Adapter
from lorascope.addresses import LAYER_PATTERN, select
from lorascope.decoders import linear_sizes, text_decoder
from lorascope.edits import Edit
from lorascope.errors import BadInput
from lorascope.rank1 import adapted_forward
from lorascope.traces import pad_ids

MISSING = object()


@dataclass(frozen=True)
class Run:
    """What a forward pass gives: `logits` [B, T, V] in the model's dtype, `scalars` [B, T, N] fp32."""

    logits: Tensor
    scalars: Tensor


@dataclass(frozen=True)
class Trunk:
    """A forward pass without the LM head: `hidden` [B, T, D] in the model's dtype, `scalars` [B, T, N] fp32."""

    hidden: Tensor
    scalars: Tensor


@dataclass(eq=False)
class Reading:
    """Scalars seen since `tap()` was entered, per module; successive forwards are joined along tokens.

    Each is itself alone: a tap inside another has seen the same and must not be taken for it.
    """

    parts: list[list[Tensor]]
    adapter: Adapter

    def scalars(self) -> Tensor:
        """All scalars [B, T, N] fp32, on the first module's device.

        Raises:
            BadInput: a module did not run.
        """
        for part, module in zip(self.parts, self.adapter.modules, strict=True):
            if not part:
                raise BadInput(f"{module.path} was not run in this forward pass, so its scalars are unknown.")
        device = self.parts[0][0].device
        return torch.cat([torch.cat(part, dim=1).to(device) for part in self.parts], dim=-1)


@dataclass(frozen=True)
class ActiveEdit:
    """An edit resolved for this adapter: for each module, which of its directions and their columns."""

    edit: Edit
    local: list[Tensor | None]
    columns: list[Tensor]


@dataclass
class Attached:
    """A model with an adapter on it. Made by `attach`; use it inside that context only."""

    model: Any
    adapter: Adapter
    readings: list[Reading] = field(default_factory=list)
    edits: list[ActiveEdit] = field(default_factory=list)
    base_run: bool = False
    """Directions are read and have no effect."""
    in_prompt: bool = False
    """True during the prefill of a generation: edits on generated tokens are then at rest."""
    shape_BT: tuple[int, int] | None = None
    """Sequences and tokens of the forward pass that runs, or ran last."""
    _head: Callable[[Tensor], Tensor] | None = None

    @property
    def addresses(self) -> list[str]:
        """The N addresses, in the order of the scalars' last dimension."""
        return self.adapter.addresses

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.model.get_input_embeddings().weight.device

    def run(self, tokens: Tensor | Sequence[Sequence[int]]) -> Run:
        """A full forward pass over right-padded sequences (values at padding mean nothing).

        Args:
            tokens: ids [B, T], or a list of sequences of ids of any lengths.
        """
        ids_BT = self._ids(tokens)
        with self.tap() as reading:
            logits = self.model(input_ids=ids_BT, use_cache=False).logits
        return Run(logits, reading.scalars())

    def trunk(self, tokens: Tensor | Sequence[Sequence[int]], places_1T: Tensor | None = None) -> Trunk:
        """A forward pass up to the final norm, without the LM head.

        Args:
            tokens: as for `run`.
            places_1T: position ids, where `tokens` are one row of sequences laid end to end in a model that
                `prepare_packing` prepared.
        """
        ids_BT = self._ids(tokens)
        packed = {} if places_1T is None else {"position_ids": places_1T.to(self.device)}
        with self.tap() as reading:
            hidden = text_decoder(self.model)(input_ids=ids_BT, use_cache=False, **packed).last_hidden_state
        return Trunk(hidden, reading.scalars())

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D] that `trunk` gave, fp32 whatever the base's precision.

        Raises:
            BadInput: the model computes its logits in a way that this does not reproduce.
        """
        if self._head is None:
            self._head = self._checked_head()
        return self._head(hidden)

    @contextmanager
    def tap(self) -> Iterator[Reading]:
        """Read the scalars of every forward inside: `with attached.tap() as reading: ...; reading.scalars()`."""
        reading = Reading([[] for _ in self.adapter.modules], self.adapter)
        self.readings.append(reading)
        try:
            yield reading
        finally:
            self.readings.remove(reading)

    @contextmanager
    def edit(self, *edits: Edit) -> Iterator[None]:
        """Apply edits, in order, to every forward inside. Nested edits apply after outer ones.

        Raises:
            BadInput: a pattern matches no direction.
        """
        before = len(self.edits)
        self.edits += [self._resolve(edit) for edit in edits]
        try:
            yield
        finally:
            del self.edits[before:]

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Inside, directions have no effect: their scalars are what they see in the base model's run."""
        before, self.base_run = self.base_run, True
        try:
            yield
        finally:
            self.base_run = before

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While text is generated: the first forward is the prompt's, the later ones are generated tokens'."""

        def next_forward(*_: object) -> None:
            state["forwards"] += 1
            self.in_prompt = state["forwards"] == 1

        state = {"forwards": 0}
        handle = self.model.register_forward_pre_hook(next_forward)
        try:
            yield
        finally:
            handle.remove()
            self.in_prompt = False

    def _resolve(self, edit: Edit) -> ActiveEdit:
        if edit.where not in ("all", "generated"):
            raise BadInput(f"An edit's `where` is 'all' or 'generated', not {edit.where!r}.")
        chosen = torch.from_numpy(select(self.addresses, edit.patterns))
        local: list[Tensor | None] = []
        columns: list[Tensor] = []
        for module in self.adapter.modules:
            hits = chosen[module.columns].nonzero()[:, 0]
            local.append(hits if len(hits) else None)
            columns.append(hits + module.columns.start)
        return ActiveEdit(edit, local, columns)

    def by_token(self, index: int, x: Tensor) -> Tensor:
        """What one module sees, [..., K], as [B, T, K]: some decoders lay the tokens of a batch end to end.

        A module outside the layers is not held to it: of a prompt, an LM head sees the last token.

        Raises:
            BadInput: the module sees some of the tokens only, as a routed expert does.
        """
        part = self.adapter.modules[index]
        if self.shape_BT is None or x.shape[:-1] == self.shape_BT or part.layer is None:
            return x
        (rows, tokens), seen = self.shape_BT, x.shape[:-1].numel()
        if seen != rows * tokens:
            raise BadInput(
                f"{part.path} sees {seen} of {rows * tokens} tokens, as a routed expert does, so it has no scalar on "
                "the others; use an adapter without it."
            )
        return x.reshape(rows, tokens, -1)

    def _pass_scalars(self, index: int, z: Tensor) -> Tensor:
        """What happens to one module's scalars on their way: edits; readings see the result; it has effect, or none."""
        acting = [active for active in self.edits if not (active.edit.where == "generated" and self.in_prompt)]
        chosen = [(active, local) for active in acting if (local := active.local[index]) is not None]
        if not chosen and not self.readings:
            return torch.zeros_like(z) if self.base_run else z
        z_BTR = self.by_token(index, z)
        for active, local in chosen:
            z_BTR = apply_edit(active.edit, z_BTR, local.to(z_BTR.device), active.columns[index].to(z_BTR.device))
        for reading in self.readings:
            reading.parts[index].append(z_BTR)
        return torch.zeros_like(z) if self.base_run else z_BTR.reshape(z.shape)

    def _see_shape(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the text decoder's forward: remember how many sequences and tokens it gets."""
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        self.shape_BT = None if given is None or given.ndim < 2 else (given.shape[0], given.shape[1])

    def _ids(self, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
        ids_BT = tokens if isinstance(tokens, Tensor) else pad_ids(list(tokens), 0)[0]
        if ids_BT.ndim != 2:
            raise BadInput(f"Tokens must be [batch, token], not of shape {list(ids_BT.shape)}.")
        return ids_BT.to(self.device)

    @torch.no_grad()
    def _checked_head(self) -> Callable[[Tensor], Tensor]:
        head = head_of(self.model)
        ids = torch.tensor([[1, 2, 3]], device=self.device) % self.model.config.get_text_config().vocab_size
        hidden = text_decoder(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        logits, ours = self.model(input_ids=ids, use_cache=False).logits, head(hidden)
        # Scaling and soft cap of a low-precision model round at every step.
        tolerance = 1e-3 if logits.dtype == torch.float32 else 2e-2
        if not torch.allclose(logits.float(), ours, rtol=tolerance, atol=tolerance * float(logits.abs().max())):
            raise BadInput("This model does not compute its logits as head(hidden); this stage cannot use it.")
        return head


def head_of(model: Any) -> Callable[[Tensor], Tensor]:
    """The LM head, hidden states [..., D] to fp32 logits [..., V], with what some configs scale or cap them by.

    A low-precision head multiplies in fp32, its weight cast once and held as long as the function: logits rounded to
    bfloat16 are off by more than what a single direction does to them.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    product: Callable[[Tensor], Tensor] = head
    # One that is of another type, or adapted, or that accelerate has hooks on, runs as it is.
    own = type(head) is nn.Linear and "forward" not in head.__dict__
    if own and head.weight.dtype in (torch.bfloat16, torch.float16):
        bias_V = None if head.bias is None else head.bias.detach().float()
        product = partial(wide_linear, weight_VD=head.weight.detach().float(), bias_V=bias_V)

    def logits(hidden: Tensor) -> Tensor:
        found = product(hidden).float()
        found = found if factor == 1.0 else found * factor
        return torch.tanh(found / cap) * cap if cap else found

    return logits


def wide_linear(hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """`hidden·weightᵀ + bias` [..., V] of hidden states [..., D] in any precision, by weights in fp32."""
    return F.linear(hidden.float(), weight_VD, bias_V)


def apply_edit(edit: Edit, z_BTR: Tensor, local: Tensor, columns: Tensor) -> Tensor:
    """z with one edit applied to its `local` directions, out of place so that gradients pass."""
    old = z_BTR[..., local]
    new = edit.change(old, columns)
    if edit.mask_BT is not None:
        new = torch.where(edit.mask_BT.to(z_BTR.device)[..., None], new, old)
    if len(local) == z_BTR.shape[-1]:
        return new
    return z_BTR.index_copy(-1, local, new)


@contextmanager
def attach(model: Any, adapter: Adapter) -> Iterator[Attached]:
    """Put an adapter on a transformers decoder; on leaving, also by an exception, the model is as it was.

    The forward of each adapted module is replaced on the instance, so the module tree, the weights and the state
    dict stay the base's own.

    Raises:
        BadInput: a module of the adapter is not in the model or not in its text decoder, or its shape differs.
    """
    attached = Attached(model, adapter)
    found = [find_module(model, module) for module in adapter.modules]
    decoder = text_decoder(model)
    refuse_other_towers(decoder, adapter, found)
    shape_hook = decoder.register_forward_pre_hook(attached._see_shape, with_kwargs=True)
    before = [linear.__dict__.get("forward", MISSING) for linear in found]
    try:
        for index, (linear, module) in enumerate(zip(found, adapter.modules, strict=True)):
            device = next(linear.parameters()).device
            linear.forward = partial(
                adapted_forward,
                base=linear.forward,
                a_RI=module.a_RI.to(device),
                b_OR=module.b_OR.to(device),
                scale=module.scale,
                tap=partial(attached._pass_scalars, index),
            )
        yield attached
    finally:
        shape_hook.remove()
        for linear, forward in zip(found, before, strict=True):
            if forward is MISSING:
                linear.__dict__.pop("forward", None)
            else:
                linear.__dict__["forward"] = forward


def find_module(model: nn.Module, module: AdaptedModule) -> Any:
    """The model's module that a direction's weights belong to, its shape checked."""
    try:
        linear: Any = model.get_submodule(module.path)
    except AttributeError as error:
        raise BadInput(
            f"The adapter's module {module.path} is not in this model; is it the adapter of another model?"
        ) from error
    sizes = linear_sizes(linear)
    if sizes is None:
        raise BadInput(f"{module.path} is a {type(linear).__name__}, not a linear map; lorascope cannot adapt it.")
    if sizes != (module.a_RI.shape[1], module.b_OR.shape[0]):
        raise BadInput(
            f"The adapter's {module.path} maps {module.a_RI.shape[1]} to {module.b_OR.shape[0]}, the model's maps "
            f"{sizes[0]} to {sizes[1]}; is it the adapter of another model?"
        )
    return linear


def refuse_other_towers(decoder: nn.Module, adapter: Adapter, found: Sequence[nn.Module]) -> None:
    """Raise BadInput for directions in layers that text does not run through, such as a vision tower's."""
    inside = set(decoder.modules())
    pairs = zip(adapter.modules, found, strict=True)
    others = [part.path for part, module in pairs if module not in inside and LAYER_PATTERN.search(part.path)]
    if others:
        raise BadInput(
            f"{len(others)} of the adapter's modules are not in the text decoder ({others[0]}), so text gives them no "
            "scalars; use an adapter without them."
        )


def decoder_layers(model: nn.Module, adapter: Adapter) -> nn.ModuleList:
    """The list of decoder layers that the adapter's modules are in, whose numbers are those in addresses.

    Raises:
        BadInput: the adapter has no module in a numbered layer.
    """
    for module in adapter.modules:
        match = re.match(r"(.*?)\.\d+\.", module.path)
        if match and isinstance(layers := model.get_submodule(match[1]), nn.ModuleList):
            return layers
    raise BadInput("The adapter adapts no numbered decoder layer; this stage cannot use it.")
