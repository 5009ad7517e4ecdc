"""Text token by token from a model that is being steered, with the activations of chosen features on every token.

Nothing stays on the model between two tokens: every pass puts its edits on and takes them off, so a stream may be
left at any time. Shape legend: T tokens of one pass, N directions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from lorascope.adapter import Adapter
from lorascope.attached import Attached, attach
from lorascope.config import Options
from lorascope.errors import BadInput
from lorascope.generation import Sampling, stop_ids
from lorascope.models import load_model
from lorascope.prepacked import prepacked_maps
from lorascope.steering.moves import Steer, check_moves
from lorascope.steering.panel import Panel, open_panel
from lorascope.steering.passes import TARGETS, WHERE, Sequel, begin_sequel, run_pass
from lorascope.study import Study
from lorascope.traces import Renderer


class StreamedToken(TypedDict):
    """One generated token."""

    token_id: int
    text: str
    """What it adds to the text: "" while a character is unfinished. Not escaped."""
    activations: dict[str, float]
    """Of each watched feature on this token, as edited; on the base model, what the read vectors see there."""
    end: bool
    """Whether this is the token by which the model ends its turn; nothing follows it."""


@dataclass(frozen=True)
class Bench:
    """A live model with the study's adapter on it, its renderer, and its features. Made by `open_bench`."""

    attached: Attached
    renderer: Renderer
    panel: Panel


@contextmanager
def open_bench(study: Study, options: Options, corpus: str = "train") -> Iterator[Bench]:
    """Load the study's model, put the adapter on it, and read what is known of its features on a corpus.

    Raises:
        MissingStage: the study has no adapter.
    """
    folder = study.require("adapter/adapter_config.json", "lorascope train STUDY").parent
    adapter = Adapter.load(folder)
    panel = open_panel(study, adapter, corpus)
    model, tokenizer = load_model(study.model_name, device=options.device, dtype=options.dtype)
    with prepacked_maps(model), attach(model, adapter) as attached:
        yield Bench(attached, study.renderer(tokenizer), panel)


def refreshed(bench: Bench, study: Study) -> Bench:
    """The same model and adapter with the SAE, the units and the rendering of prompts that the study has by now."""
    panel = open_panel(study, bench.attached.adapter, bench.panel.corpus)
    return replace(bench, renderer=study.renderer(bench.renderer.tokenizer), panel=panel)


def steer_stream(
    bench: Bench,
    prompt: Sequence[int],
    *,
    steers: Sequence[Steer] = (),
    watch: Sequence[str] = (),
    target: str = "adapter",
    where: str = "generated",
    sampling: Sampling | None = None,
) -> Iterator[StreamedToken]:
    """Continue a prompt, yielding each token after the pass over it. Close the iterator to stop in between.

    Two streams with the same seed draw the same noise at every step, so that they part only where the steering
    makes them. Everything is checked in the call, before the first token.

    Args:
        prompt: token ids, as from `bench.renderer.prompt_ids(question)`.
        steers: moves to make, in order; none for the text as it is.
        watch: features whose activations to report.
        target: what is steered, one of `TARGETS`.
        where: which tokens are edited, `generated` ones or `all`, the prompt included.
        sampling: length, temperature and seed; nothing else of it applies. The seed also draws the control.

    Raises:
        BadInput: an unknown feature, mode, target or place, or on the base model a mode other than add.
        MissingStage: the SAE or the examples that give an amount its unit have not been made.
    """
    sampling = sampling or Sampling()
    if target not in TARGETS:
        raise BadInput(f"There is no target {target!r} of steering; choose from {', '.join(TARGETS)}.")
    if where not in WHERE:
        raise BadInput(f"Steering acts on {' or '.join(WHERE)} tokens, not on {where!r}.")
    if not prompt:
        raise BadInput("The prompt is empty; give it some text.")
    check_moves(bench.panel, steers)
    if target == "base" and any(steer.mode != "add" for steer in steers):
        raise BadInput("On the base model every scalar is 0, so a feature can only be added there.")
    bench.panel.activations(watch, bench.panel.effect_N[None])  # names what is not there
    sequel = begin_sequel(bench.attached, bench.panel, steers, target, sampling.seed)
    return stream_tokens(bench, sequel, list(prompt), tuple(watch), where, sampling)


def stream_tokens(
    bench: Bench, sequel: Sequel, prompt: list[int], watch: tuple[str, ...], where: str, sampling: Sampling
) -> Iterator[StreamedToken]:
    """The generator behind `steer_stream`."""
    ends = stop_ids(bench.attached.model, bench.renderer)
    noise = torch.Generator().manual_seed(sampling.seed)
    logits_V, _ = run_pass(sequel, prompt, edited=where == "all")
    made: list[int] = []
    shown = ""
    while len(made) < sampling.max_new_tokens:
        barred = ends if len(made) < sampling.min_new_tokens else []
        made.append(next_token(logits_V, sampling.temperature, noise, barred))
        logits_V, z_1N = run_pass(sequel, made[-1:], edited=True)
        end = made[-1] in ends
        text = str(bench.renderer.tokenizer.decode(made, skip_special_tokens=False))
        if not end and len(made) < sampling.max_new_tokens:
            text = text.rstrip("\ufffd")  # perhaps the first bytes of a character to come
        new, shown = text[len(shown) :], max(text, shown, key=len)
        acts_F = bench.panel.activations(watch, z_1N)[0].tolist()
        yield {"token_id": made[-1], "text": new, "activations": dict(zip(watch, acts_F, strict=True)), "end": end}
        if end:
            return


def next_token(logits_V: Tensor, temperature: float, noise: torch.Generator, barred: Sequence[int]) -> int:
    """The likeliest token, or one drawn by adding Gumbel noise: with equal noise, like logits draw the same token."""
    scores_V = logits_V.float().cpu()
    scores_V[list(barred)] = -torch.inf
    if temperature > 0:
        uniform_V = torch.rand(len(scores_V), generator=noise, dtype=torch.float64).clamp_min(1e-300)
        scores_V = scores_V.double() / temperature - torch.log(-torch.log(uniform_V))
    return int(scores_V.argmax())
