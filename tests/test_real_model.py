"""The built-in model, for real and small: fetched, trained two steps, attached, evaluated, ablated, recorded."""

import numpy as np
import pytest
import torch
from peft import PeftModel

from lorascope.adapter import Adapter
from lorascope.attached import attach
from lorascope.cli import main
from lorascope.models import load_model
from lorascope.store import Store
from lorascope.study import Study

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    path = tmp_path_factory.mktemp("real") / "study"
    new = [
        "--model",
        MODEL,
        "--traces",
        "tasks:chain,letters",
        "--train-problems",
        "8",
        "--heldout",
        "4",
        "--system",
        "",
    ]
    assert main(["new", str(path), *new]) == 0
    train = ["--batch", "4", "--max-steps", "2", "--eval-traces", "2", "--learning-rate", "1e-2"]
    assert main(["train", str(path), *train]) == 0
    return Study.open(path)


def test_two_steps_lower_the_held_out_loss(study: Study) -> None:
    result = study.manifest["stages"]["train:adapter"]["result"]
    assert result["parameters"] == 305_280
    assert result["heldout_loss"] < result["heldout_loss_before"]


def test_the_trained_adapter_loads_in_peft_and_gives_the_same_logits(study: Study) -> None:
    model, tokenizer = load_model(MODEL)
    ids = torch.tensor([study.renderer(tokenizer).prompt_ids("What is 31 + 45 + 12?")])
    adapter = Adapter.load(study.path / "adapter")
    assert len(adapter.addresses) == 210
    with torch.no_grad():
        base = model(input_ids=ids).logits
        with attach(model, adapter) as attached:
            ours = attached.run(ids).logits
        theirs = PeftModel.from_pretrained(model, str(study.path / "adapter")).eval()(input_ids=ids).logits
    assert (ours - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max())
    assert (ours - base).abs().max() > 0.01


def test_the_stages_run_and_agree(study: Study) -> None:
    path = str(study.path)
    assert main(["record", path, "--source", "adapter,base"]) == 0
    assert main(["ablate", path, "--by", "group", "--traces", "2"]) == 0
    assert main(["evaluate", path, "--on", "chain", "--n", "2", "--models", "adapter", "--max-new-tokens", "8"]) == 0
    store = Store.open(study.path / "scalars" / "train" / "adapter")
    model, tokenizer = load_model(MODEL)
    rendered = study.renderer(tokenizer).render(study.traces("train")[0])
    with torch.no_grad(), attach(model, Adapter.load(study.path / "adapter")) as attached:
        scalars = attached.run([rendered.ids.tolist()]).scalars[0].numpy()
    _, recorded = store.trace(store.trace_ids.index(rendered.trace_id))
    spread = np.abs(scalars).max(axis=0)
    assert np.all(np.abs(recorded - scalars) <= 2e-3 * spread + 1e-6)
    assert store.sink[store.offsets[:-1]].all()
    assert not store.ordinary[store.offsets[:-1]].any()
