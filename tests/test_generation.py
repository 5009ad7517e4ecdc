"""Generation: batches equal single greedy runs, stops and budgets hold, edits can wait for generated tokens."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from lorascope import edits, generation
from lorascope.attached import attach
from lorascope.generation import Sampling, common_prefix, cut_at_end, generate, generate_batch, plan_rows, stop_ids
from lorascope.models import load_model
from lorascope.traces import Renderer
from tiny_folder import save_tiny
from tiny_models import random_adapter
from tiny_text import tiny_tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Renderer]:
    model, tokenizer = load_model(str(save_tiny(tmp_path_factory.mktemp("tiny"))))
    return model, Renderer(tokenizer, system="")


PROMPTS = ["Hi", "What is 2+2?", "A much longer question, to pad the others."]


def test_a_batch_equals_single_greedy_runs_by_hand(loaded: tuple[Any, Renderer]) -> None:
    model, renderer = loaded
    prompts = [renderer.prompt_ids(p) for p in PROMPTS]
    with torch.no_grad(), attach(model, random_adapter(model)) as attached:
        results = generate_batch(attached, renderer, prompts, Sampling(max_new_tokens=12, rows=2))
        for prompt, result in zip(prompts, results, strict=True):
            ids = list(prompt)
            for _ in range(12):
                ids.append(int(attached.run([ids]).logits[0, -1].argmax()))
            assert cut_at_end(ids[len(prompt) :], stop_ids(model, renderer)) == result


def test_finished_rows_leave_and_the_cache_grows(loaded: tuple[Any, Renderer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end at different steps, in short stretches, equal runs of one prompt each; so does a second batch."""
    model, renderer = loaded
    prompts = [renderer.prompt_ids(p) for p in [*PROMPTS, "Why?"]]
    sampling = Sampling(max_new_tokens=150)
    single = [generate_batch(model, renderer, [p], sampling)[0] for p in prompts]
    common = Counter(id_ for result in single for id_ in result.ids[20:]).most_common()
    ends = [id_ for id_, _ in common[-6:]]  # seldom tokens, so that rows end at various places
    monkeypatch.setattr(generation, "stop_ids", lambda *_: ends)
    monkeypatch.setattr(generation, "STRETCH", 4)
    wanted = [cut_at_end(result.ids, ends) for result in single]
    assert len({len(result.ids) for result in wanted}) > 1
    with torch.no_grad(), attach(model, random_adapter(model)) as attached, attached.edit(edits.off("*")):
        assert generate_batch(attached, renderer, prompts, sampling) == wanted


def test_per_sequence_edits_keep_their_rows(loaded: tuple[Any, Renderer]) -> None:
    model, renderer = loaded
    prompts = [renderer.prompt_ids(p) for p in PROMPTS]
    adapter = random_adapter(model)
    gates = torch.stack([torch.zeros(len(adapter.addresses)), *[torch.ones(len(adapter.addresses))] * 2])
    sampling = Sampling(max_new_tokens=40)
    with torch.no_grad(), attach(model, adapter) as attached:
        plain = generate_batch(attached, renderer, prompts, sampling)
        with attached.edit(edits.gate(gates)):
            gated = generate_batch(attached, renderer, prompts, sampling)
    # Batches are ordered by length; the shortest prompt is the one whose adapter is off.
    assert gated[0] == generate_batch(model, renderer, prompts[:1], sampling)[0]
    assert gated[1:] == plain[1:]


def test_a_common_prefix_is_run_once_and_changes_nothing(
    loaded: tuple[Any, Renderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, renderer = loaded
    prompts = [renderer.prompt_ids("These words are shared by all of the questions. " + p) for p in PROMPTS]
    shared = common_prefix(prompts)
    assert all(p[: len(shared)] == shared for p in prompts)
    assert len({p[len(shared)] for p in prompts}) > 1
    sampling = Sampling(max_new_tokens=20)
    adapter = random_adapter(model)
    with torch.no_grad(), attach(model, adapter) as attached:
        single = [generate_batch(attached, renderer, [p], sampling)[0] for p in prompts]
        seen: list[int] = []
        hook = model.get_input_embeddings().register_forward_hook(lambda *a: seen.append(a[1][0].shape[1]))
        assert generate_batch(attached, renderer, prompts, sampling) == single
        hook.remove()
        assert seen[:2] == [len(shared), max(map(len, prompts)) - len(shared)]
        with attached.edit(edits.off("*", to=7.0, where="generated")):
            edited = generate_batch(attached, renderer, prompts, sampling)
            assert edited == [generate_batch(attached, renderer, [p], sampling)[0] for p in prompts]
    assert common_prefix([[1] * 40, [1] * 40]) == [1] * 39
    assert common_prefix([[1] * 40]) == []
    assert common_prefix([[1] * 40, [2] * 40]) == []


def test_batches_keep_to_both_limits() -> None:
    plan = plan_rows([5, 50, 6, 7], Sampling(max_new_tokens=10, rows=3, token_budget=40))
    assert plan == [[0, 2], [3], [1]]
    assert plan_rows([5] * 7, Sampling(max_new_tokens=10, rows=3)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_sampling_follows_its_seed(loaded: tuple[Any, Renderer]) -> None:
    model, renderer = loaded
    prompts = [renderer.prompt_ids(p) for p in PROMPTS]

    def sample(seed: int) -> list[Any]:
        return generate_batch(model, renderer, prompts, Sampling(max_new_tokens=20, temperature=1.0, seed=seed))

    state = torch.random.get_rng_state()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_defaults_a_checkpoint_brings_change_nothing(
    loaded: tuple[Any, Renderer], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """As Qwen2.5-Instruct's generation_config.json does: what is generated is decided by `Sampling` alone."""
    model, renderer = loaded
    prompts = [renderer.prompt_ids(p) for p in PROMPTS]
    sampling = Sampling(max_new_tokens=30, temperature=temperature, thinking_budget=20)
    monkeypatch.setattr(model, "generation_config", GenerationConfig())
    bare = generate_batch(model, renderer, prompts, sampling)
    brought = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.2,
        top_k=3,
        min_p=0.3,
        repetition_penalty=1.5,
        no_repeat_ngram_size=2,
        min_new_tokens=25,
        suppress_tokens=bare[0].ids[:3],
        bad_words_ids=[[bare[1].ids[1]]],
        max_length=400,
    )
    monkeypatch.setattr(model, "generation_config", brought)
    assert generate_batch(model, renderer, prompts, sampling) == bare
    assert model.generation_config is brought


def test_the_end_of_a_turn_is_its_control_token(loaded: tuple[Any, Renderer]) -> None:
    """Llama 2's template puts a space before it, others a line break; that plain token ends nothing."""
    model, _ = loaded
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ '<|im_start|> ' + m.content + ' ' + '<|im_end|>' }}{% endfor %}", eos="<|endoftext|>"
    )
    renderer = Renderer(tokenizer, system="")
    assert renderer.end_of_turn == " <|im_end|>"
    ends = stop_ids(model, renderer)
    assert set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])) <= set(ends)
    assert tokenizer(" ")["input_ids"][0] not in ends


def test_ends_are_cut_and_marked() -> None:
    assert cut_at_end([5, 6, 2, 7], [2]).ids == [5, 6]
    assert cut_at_end([5, 6, 2, 7], [2]).finished
    assert not cut_at_end([5, 6], [2]).finished


@pytest.mark.parametrize("budget", [None, 10])
def test_no_row_ends_before_the_fewest_tokens(
    loaded: tuple[Any, Renderer], monkeypatch: pytest.MonkeyPatch, budget: int | None
) -> None:
    model, renderer = loaded
    prompts = [renderer.prompt_ids(p) for p in PROMPTS]
    longest = Sampling(max_new_tokens=40, thinking_budget=budget)
    free = generate_batch(model, renderer, prompts, longest)
    ends = [free[0].ids[2], free[1].ids[3]]  # both rows would end early, at different tokens
    monkeypatch.setattr("lorascope.generation.stop_ids", lambda *_: ends)
    early = generate_batch(model, renderer, prompts, longest)
    late = generate_batch(model, renderer, prompts, replace(longest, min_new_tokens=25))
    assert all(result.finished and len(result.ids) < 10 for result in early)
    assert all(len(result.ids) >= 25 for result in late)


def test_a_thinking_budget_closes_the_thinking(loaded: tuple[Any, Renderer]) -> None:
    model, renderer = loaded
    prompt = renderer.prompt_ids("Hi")
    free = generate_batch(model, renderer, [prompt], Sampling(max_new_tokens=30))[0]
    assert not free.finished
    forced = generate_batch(model, renderer, [prompt], Sampling(max_new_tokens=30, thinking_budget=10))[0]
    text = renderer.tokenizer.decode(forced.ids)
    assert forced.ids[:10] == free.ids[:10]
    assert text.count("</think>") == 1


def test_edits_on_generated_tokens_leave_the_prompt_alone(loaded: tuple[Any, Renderer]) -> None:
    model, renderer = loaded
    prompt = renderer.prompt_ids("What is 2+2?")
    adapter = random_adapter(model)
    with torch.no_grad(), attach(model, adapter) as attached:
        with attached.tap() as plain:
            generate_batch(attached, renderer, [prompt], Sampling(max_new_tokens=4))
        with attached.edit(edits.off("*", to=7.0, where="generated")), attached.tap() as edited:
            generate_batch(attached, renderer, [prompt], Sampling(max_new_tokens=4))
    before, after = plain.scalars()[0], edited.scalars()[0]
    torch.testing.assert_close(after[: len(prompt)], before[: len(prompt)])
    assert bool((after[len(prompt) :] == 7.0).all())
    assert len(after) == len(prompt) + 3


def test_generate_takes_a_question(loaded: tuple[Any, Renderer]) -> None:
    model, renderer = loaded
    text = generate(model, renderer.tokenizer, "Hi", sampling=Sampling(max_new_tokens=5), system="")
    prompt = renderer.prompt_ids("Hi")
    ids = generate_batch(model, renderer, [prompt], Sampling(max_new_tokens=5))[0].ids
    assert text == renderer.tokenizer.decode(ids)
