"""`lorascope train`: a rank-1 (or rank-r) adapter, or a full finetune, on the study's training traces.

The loss is the mean negative log-likelihood, in nats, of the assistant's tokens; logits exist only there.

Shapes: B = sequences, T = tokens, M = supervised positions of a batch, D = model width.
"""

import math
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorascope.adapter import Adapter, initial_adapter
from lorascope.attached import attach, head_of
from lorascope.config import Options
from lorascope.decoders import in_no_group, not_linear, text_decoder
from lorascope.errors import BadInput, RunFailed
from lorascope.fused import HEAD_CHUNK, fused, head_loss, plain_head
from lorascope.kl import assistant_positions
from lorascope.models import load_model
from lorascope.packing import prepare_packing
from lorascope.progress import progress
from lorascope.study import Study, digest, put_folder, whole_folder
from lorascope.traces import Rendered
from lorascope.training_plan import batches_of, control_traces, plan_steps, rate_at
from lorascope.training_state import Metrics, State

CONTROLS = ("", "answers", "shuffled")
TRAINED_ON = ("traces/train.jsonl", "traces/heldout.jsonl", "tokenizer")


@dataclass(frozen=True)
class TrainConfig:
    """Train a rank-1 adapter (or rank-r, or with --full all weights) on the study's training traces."""

    rank: int = 1
    """Directions per adapted matrix."""
    full: bool = False
    """Train all weights instead of an adapter, as the baseline that recovery is measured against."""
    modules: str = "attn,mlp"
    """Which matrices to adapt: attn, mlp, or patterns of types or addresses."""
    layers: str = "*"
    """Which layers to adapt: 12, 0-9, 0-29:3, a pattern such as * or 2[0-9], or a comma list of these."""
    alpha: float = 16.0
    """LoRA alpha; the scale is alpha/√rank."""
    control: str = ""
    """Train a control: answers (the same problems, answers only) or shuffled (traces of other problems)."""
    learning_rate: str = ""
    """Peak learning rate (default: 1e-3, full: 1e-4); of a comma list, the best by held-out loss is kept."""
    epochs: float = 5.0
    """Passes over the training traces."""
    max_steps: int | None = None
    """Stop (and end the cosine) after so many steps."""
    batch: int = 16
    """Traces per step."""
    token_budget: int = 2048
    """Tokens per forward pass, padding included; a step's gradients are accumulated over as many passes as it takes."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 1e-4
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    eval_every: int = 20
    """Steps between measurements of the held-out loss."""
    eval_traces: int = 64
    """Held-out traces in that measurement."""
    save_every: int = 25
    """Steps between saved states, from which an interrupted run continues."""
    checkpoints: str = ""
    """Steps at which to keep a copy of the adapter, such as 1,2,4,8,16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third slower."""
    pack: bool = True
    """Put sequences end to end instead of padding them; a model that would mix them pads all the same."""
    compile: bool = False
    """Compile the model with torch.compile, on padded batches; the first steps take minutes and need a C++ compiler."""


def run_name(config: TrainConfig) -> str:
    """Where the run's weights go, relative to the study: `adapter`, `full`, `controls/answers`, …"""
    kind = "full" if config.full else "adapter"
    return f"controls/{config.control}{'-full' if config.full else ''}" if config.control else kind


def train(study: Study, config: TrainConfig, options: Options) -> dict[str, Any]:
    """Train and save to `adapter/` or `full/` (controls: `controls/NAME/`), metrics to `train/NAME.jsonl`.

    Raises:
        BadInput: a nonsensical config, or an adapter that was not trained here is in the way.
        RunFailed: the loss is not finite.
    """
    check_config(study, config)
    name = run_name(config)
    study.require("traces/train.jsonl", "lorascope new STUDY --model M --traces T")

    def work() -> dict[str, Any]:
        rates = learning_rates(config)
        names = [name] if len(rates) == 1 else [tagged(name, rate) for rate in rates]
        results = [train_once(study, config, options, *run) for run in zip(rates, names, strict=True)]
        best = min(results, key=lambda result: result["heldout_loss"])
        if len(rates) > 1:
            best = keep_best(study, name, best, results)
        for own in names:
            shutil.rmtree(state_folder(study, own), ignore_errors=True)
        return best

    outputs = [name, f"train/{name}.jsonl"]
    result = study.run(f"train:{name}", config, options, inputs=TRAINED_ON, outputs=outputs, work=work)
    if name == "adapter":
        study.update_manifest(adapter="trained here")
    return result


def check_config(study: Study, config: TrainConfig) -> None:
    """Refuse what cannot be trained before anything heavy is loaded."""
    if config.control not in CONTROLS:
        raise BadInput(f"--control is answers or shuffled, not {config.control!r}.")
    for field in ("rank", "batch", "token_budget", "eval_every", "eval_traces", "save_every"):
        if getattr(config, field) < 1:
            raise BadInput(f"--{field.replace('_', '-')} must be at least 1, not {getattr(config, field)}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("lorascope trains in one process; start it without torchrun or accelerate launch.")
    if config.epochs <= 0 or (config.max_steps is not None and config.max_steps < 1):
        raise BadInput("--epochs and --max-steps must be above zero.")
    own = study.manifest["adapter"]
    if run_name(config) == "adapter" and own not in (None, "trained here"):
        raise BadInput(f"{study.path} is a study of the adapter {own}; make another study to train one.")
    if config.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        raise BadInput("--compile needs a C++ compiler, and none is found; install one or leave it out.")
    learning_rates(config)
    if checkpoint_steps(config) and config.full:
        raise BadInput("--checkpoints are copies of an adapter; leave it out with --full.")


def learning_rates(config: TrainConfig) -> list[float]:
    """The learning rates to try, as numbers."""
    text = config.learning_rate or ("1e-4" if config.full else "1e-3")
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"--learning-rate must be a number or a comma list of numbers, not {text!r}.") from error
    if not all(0 < rate < 1 for rate in rates):
        raise BadInput(f"--learning-rate must lie between 0 and 1, not {text!r}.")
    return rates


def checkpoint_steps(config: TrainConfig) -> set[int]:
    """The steps at which a copy of the adapter is kept."""
    try:
        return {int(part) for part in config.checkpoints.split(",") if part.strip()}
    except ValueError as error:
        raise BadInput(f"--checkpoints is a comma list of steps, not {config.checkpoints!r}.") from error


def keep_best(study: Study, name: str, best: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Move the weights of the best learning rate into place and record what all of them gave."""
    own = tagged(name, best["learning_rate"])
    put_folder(study.path / own, study.path / name)
    metrics_file(study, own).replace(metrics_file(study, name))
    for result in results:
        shutil.rmtree(study.path / tagged(name, result["learning_rate"]), ignore_errors=True)
    tried = [{key: result[key] for key in ("learning_rate", "heldout_loss")} for result in results]
    return best | {"tried": tried}


def tagged(name: str, rate: float) -> str:
    """A sibling name for one of several learning rates."""
    return f"{name}-lr{rate:g}"


def metrics_file(study: Study, name: str) -> Path:
    """Where a run of that name writes its metrics."""
    return study.path / "train" / f"{name}.jsonl"


def state_folder(study: Study, name: str) -> Path:
    """Where a run of that name keeps what it continues from."""
    return study.path / "train" / f".state-{digest(name)[:8]}"


class Learner(nn.Module):
    """The model with what is trained in it; its forward is the summed loss of a batch.

    A module, so that `torch.compile` can wrap it.
    """

    def __init__(self, model: Any, adapter: Adapter | None) -> None:
        super().__init__()
        self.model = model
        if adapter is not None:
            model.requires_grad_(False)
            self.adapter_weights = nn.ParameterList([t for m in adapter.modules for t in (m.a_RI, m.b_OR)])

    @property
    def head_VD(self) -> Tensor | None:
        """The LM head's weight, where it is all that the head does."""
        return plain_head(self.model)

    def forward(
        self, ids_BT: Tensor, rows_M: Tensor, positions_M: Tensor, position_ids_BT: Tensor | None = None
    ) -> Tensor:
        """Summed negative log-likelihood, nats, of the tokens after the supervised positions of a `Batch`."""
        packed = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
        hidden_BTD = text_decoder(self.model)(input_ids=ids_BT, use_cache=False, **packed).last_hidden_state
        hidden_MD, targets_M = hidden_BTD[rows_M, positions_M], ids_BT[rows_M, positions_M + 1]
        if self.head_VD is not None:
            return head_loss(hidden_MD, self.head_VD, targets_M)
        loss = hidden_MD.new_zeros((), dtype=torch.float32)
        for hidden, target in zip(hidden_MD.split(HEAD_CHUNK), targets_M.split(HEAD_CHUNK), strict=True):
            if self.training and len(hidden_MD) > HEAD_CHUNK:
                loss = loss + checkpoint(self._chunk_loss, hidden, target, use_reentrant=False)
            else:
                loss = loss + self._chunk_loss(hidden, target)
        return loss

    def _chunk_loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head_of(self.model)(hidden), target, reduction="sum")


def trainable_adapter(model: Any, config: TrainConfig, seed: int, base_name: str) -> Adapter:
    """A fresh adapter whose weights are parameters on their modules' devices."""
    adapter = initial_adapter(
        model,
        patterns=config.modules,
        layers=config.layers,
        rank=config.rank,
        alpha=config.alpha,
        seed=seed,
        base_name=base_name,
    )
    modules = []
    for module in adapter.modules:
        device = next(model.get_submodule(module.path).parameters()).device
        a_RI, b_OR = nn.Parameter(module.a_RI.to(device)), nn.Parameter(module.b_OR.to(device))
        modules.append(replace(module, a_RI=a_RI, b_OR=b_OR))
    return replace(adapter, modules=tuple(modules))


def detached(adapter: Adapter) -> Adapter:
    """A copy on the CPU, without gradients, ready to save."""
    return replace(
        adapter,
        modules=tuple(
            replace(m, a_RI=m.a_RI.detach().cpu().clone(), b_OR=m.b_OR.detach().cpu().clone()) for m in adapter.modules
        ),
    )


@torch.no_grad()
def heldout_loss(learner: Any, traces: Sequence[Rendered], budget: int, device: torch.device, *, pack: bool) -> float:
    """Mean negative log-likelihood per supervised token, nats."""
    learner.eval()
    total, count = 0.0, 0
    for batch in batches_of(traces, budget, device, pack=pack):
        total += float(learner(*batch))
        count += len(batch.rows_M)
    learner.train()
    return total / count


def train_once(study: Study, config: TrainConfig, options: Options, rate: float, name: str) -> dict[str, Any]:
    """One training run at one learning rate; saves the weights under `name` and returns the headline numbers.

    A run that has come to its end already is not run again.
    """
    dtype = "float32" if config.full else options.dtype
    model, tokenizer = load_model(study.model_name, device=options.device, dtype=dtype)
    files = [study.fingerprint(file) for file in TRAINED_ON]
    key = digest([asdict(config), rate, options.seed, str(model.dtype), model.device.type, files])
    state, log = State(state_folder(study, name), key), metrics_file(study, name)
    done = state.result()
    if done is not None and (study.path / name).exists() and log.exists():
        return done
    if config.gradient_checkpointing:  # renamed in transformers 5.24
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    renderer = study.renderer(tokenizer)
    traces = control_traces(study.traces("train"), config.control, options.seed)
    rendered, counts = renderer.render_all(traces)
    heldout, _ = renderer.render_all(control_traces(study.traces("heldout"), config.control, options.seed))
    heldout = heldout[: config.eval_traces]
    if not heldout:
        raise BadInput("The study has no held-out trace to measure the loss on; make it anew with --heldout.")
    # A compiled pass would be compiled anew for every way in which lengths can follow each other.
    longest = max(len(trace.ids) for trace in [*rendered, *heldout])
    pack = config.pack and not config.compile and prepare_packing(model, longest)
    torch.manual_seed(options.seed)
    adapter = None if config.full else trainable_adapter(model, config, options.seed, study.model_name)
    lengths = [len(r.ids) for r in rendered]
    steps = plan_steps(lengths, config.batch, config.epochs, config.max_steps, options.seed)
    with ExitStack() as stack:
        if adapter is not None:
            attached = stack.enter_context(attach(model, adapter))
            with torch.no_grad():  # what no later stage could read is refused now
                attached.trunk([rendered[0].ids[:8].tolist()] * 2)
        stack.enter_context(fused(model, adapter))
        learner: Any = Learner(model, adapter)
        if config.compile:
            learner = torch.compile(learner, dynamic=True)
        run = Run(config, rate, rendered, heldout, steps, adapter, study.path / name, pack)
        summary = run.loop(learner, state, log)
    with whole_folder(study.path / name) as new:
        if adapter is not None:
            detached(adapter).save(new)
        else:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
    result = summary | {"learning_rate": rate, "packed": pack, "length_rule": counts, "traces": len(rendered)}
    if adapter is not None:
        adapted = {module.type for module in adapter.modules}
        if others := [*not_linear(model), *(type_ for type_ in in_no_group(model) if type_ not in adapted)]:
            result["not_adapted"] = others
            study.log(f"train: no linear maps, or of no group, so not adapted: {', '.join(others)}")
    state.finish(result)
    return result


@dataclass
class Run:
    """One training run: its data and its plan."""

    config: TrainConfig
    rate: float
    traces: list[Rendered]
    heldout: list[Rendered]
    steps: list[list[int]]
    adapter: Adapter | None
    folder: Path
    pack: bool

    def loop(self, learner: Any, state: State, log: Path) -> dict[str, Any]:
        """Train from the state's step to the end."""
        config = self.config
        device = next(learner.parameters()).device
        parameters = [p for p in learner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.rate, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
        )
        state.load(optimizer, parameters)
        metrics = Metrics(log, state.step)
        total = len(self.steps)
        learner.train()
        if state.step == 0:
            start_loss = heldout_loss(learner, self.heldout, config.token_budget, device, pack=self.pack)
            metrics.add(step=0, heldout_loss=start_loss)
        keep = checkpoint_steps(config)
        for step in progress(range(state.step, total), desc=log.stem, unit="step", total=total - state.step):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, total, self.rate, config.warmup)
            row = self.step(learner, optimizer, parameters, self.steps[step])
            state.step = step + 1
            row |= {"lr": optimizer.param_groups[0]["lr"]}
            if state.step % config.eval_every == 0 or state.step == total:
                row["heldout_loss"] = heldout_loss(learner, self.heldout, config.token_budget, device, pack=self.pack)
            metrics.add(step=state.step, **row)
            if state.step in keep and self.adapter is not None:
                detached(self.adapter).save(
                    self.folder.parent / "train" / f"{self.folder.name}-steps" / str(state.step)
                )
            if state.step % config.save_every == 0 and state.step < total:
                state.save(optimizer, parameters)
        return self.summary(metrics.rows, parameters)

    def step(self, learner: Any, optimizer: Any, parameters: Sequence[Tensor], chosen: list[int]) -> dict[str, Any]:
        """One optimizer step over some traces, their gradients accumulated over budgeted batches."""
        started = time.perf_counter()
        traces = [self.traces[i] for i in chosen]
        supervised = sum(len(assistant_positions(t)) for t in traces)
        device, losses = parameters[0].device, []
        for batch in batches_of(traces, self.config.token_budget, device, pack=self.pack):
            loss = learner(*batch)
            loss.backward()
            losses.append(loss.detach())  # read at the end: a GPU goes on with the next batch
        # Divided afterwards and in fp32: a mean's slopes are so small that an fp16 base would lose them.
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], float(supervised))
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss_mean = sum(float(loss) for loss in losses) / supervised
        if not math.isfinite(loss_mean):
            raise RunFailed("The training loss is not finite; lower --learning-rate and train again.")
        return {
            "loss": loss_mean,
            "grad_norm": float(norm),
            "tokens": sum(len(t.ids) for t in traces),
            "supervised": supervised,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def summary(self, rows: list[dict[str, Any]], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Headline numbers of the run from its metrics."""
        stepped = [row for row in rows if "loss" in row]
        losses = [row["heldout_loss"] for row in rows if "heldout_loss" in row]
        return {
            "steps": len(stepped),
            "tokens": sum(row["tokens"] for row in stepped),
            "supervised": sum(row["supervised"] for row in stepped),
            "train_seconds": round(sum(row["seconds"] for row in stepped), 1),
            "parameters": sum(p.numel() for p in parameters),
            "heldout_loss_before": losses[0],
            "heldout_loss": losses[-1],
        }
