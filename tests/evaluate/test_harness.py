"""Evaluation on tasks: shots, prompts that are too long, normalization, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.errors import DataError, TokenizerError, UsageError
from gptsmith.evaluate import harness
from gptsmith.evaluate.harness import Results, best_choice, prompt_text, run_tasks, split_items
from gptsmith.evaluate.provenance import weights_sha256
from gptsmith.evaluate.scoring import encode_pairs
from gptsmith.model.transformer import Transformer
from gptsmith.tasks.definition import Definition, parse_definition
from gptsmith.tokenizer import Tokenizer, train_bpe, train_char
from tests.factories import tiny_model

WORDS = ["river", "stone", "cloud", "meadow", "storm", "leaf", "bird", "fish", "tree", "moon", "sand", "snow"]
BPE = train_bpe(["Q: river stone cloud meadow\nA: storm leaf bird\n\nfish tree moon sand snow is " * 4], 300)
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"


def records(count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        words = [WORDS[(i + 5 * j + i // len(WORDS)) % len(WORDS)] for j in range(4)]
        rows.append({"q": f"{words[0]} {i}", "options": words[1:], "right": i % 3})
    return rows


def task(count: int = 30, *, rows: list[dict[str, Any]] | None = None, **keys: Any) -> Definition:
    values = {
        "source": {"rows": records(count) if rows is None else rows},
        "prompt": "Q: {{ q }}\nA:",
        "choices": "options",
        "answer": "right",
        **keys,
    }
    values = {key: value for key, value in values.items() if value is not None}
    return parse_definition(json.dumps(values), "mine", Path())


def model(context: int = 256, seed: int = 0) -> Transformer:
    return tiny_model(vocab_size=BPE.vocab_size, max_position_embeddings=context, seed=seed)


def logprob(model: Transformer, tokenizer: Tokenizer, context: str, text: str) -> float:
    """Score a text by the plain forward."""
    (pair,) = encode_pairs(tokenizer, [(context, text)])
    ids = torch.tensor([[*pair.context, *pair.ids]])
    with torch.no_grad():
        logprobs = model(ids[:, :-1]).log_softmax(dim=-1)[0, -len(pair.ids) :]
    return float(logprobs.gather(1, torch.tensor(pair.ids)[:, None]).sum())


@pytest.mark.parametrize("normalization", ["raw", "characters", "bytes", "tokens", "pmi"])
def test_the_best_choice_by_the_plain_forward(normalization: str) -> None:
    mine, network = task(12, normalization=normalization), model()
    (result,) = run_tasks(network, BPE, [mine]).tasks
    for outcome, row in zip(result.outcomes, records(12), strict=True):
        prompt, values = f"Q: {row['q']}\nA:", []
        for choice in row["options"]:
            value = logprob(network, BPE, prompt, f" {choice}")
            length = {
                "raw": 1,
                "pmi": 1,
                "characters": len(choice),
                "bytes": len(choice.encode()),
                "tokens": len(BPE.encode(f" {choice}")),
            }[normalization]
            base = logprob(network, BPE, "Answer:", f" {choice}") if normalization == "pmi" else 0.0
            values.append((value - base) / length)
            assert outcome.logprobs[len(values) - 1] == pytest.approx(value, abs=1e-4)
        assert outcome.answer == row["options"][values.index(max(values))]
        assert outcome.score == (values.index(max(values)) == row["right"])
    assert result.chance == pytest.approx(1 / 3)
    assert result.score == sum(outcome.score for outcome in result.outcomes) / 12


def test_characters_are_not_bytes() -> None:
    texts, totals, tokens = ["café", "cafes"], [-4.0, -4.6], [3, 2]
    assert best_choice("raw", texts, totals, tokens) == 0
    assert best_choice("characters", texts, totals, tokens) == 1  # -1.00 and -0.92
    assert best_choice("bytes", texts, totals, tokens) == 0  # -0.80 and -0.92
    assert best_choice("tokens", texts, totals, tokens) == 0
    assert best_choice("pmi", texts, totals, tokens, [-3.0, -4.5]) == 1


def test_the_number_of_items_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network, mine = model(), task(20, normalization="pmi")
    together = run_tasks(network, BPE, [mine], shots=(2,)).tasks[0]
    monkeypatch.setattr(harness, "ITEMS_AT_ONCE", 1)
    singly = run_tasks(network, BPE, [mine], shots=(2,)).tasks[0]
    for a, b in zip(together.outcomes, singly.outcomes, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert (a.answer, a.prompt_sha256) == (b.answer, b.prompt_sha256)


def test_the_order_of_the_choices_changes_no_score() -> None:
    network = model()
    turned = [{**row, "options": row["options"][::-1], "right": 2 - row["right"]} for row in records(12)]
    one, other = (run_tasks(network, BPE, [task(rows=rows)]).tasks[0] for rows in (records(12), turned))
    for a, b in zip(one.outcomes, other.outcomes, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs[::-1], abs=1e-4)
        assert a.score == b.score


# Shots ----------------------------------------------------------------------------------------------------------------


def test_no_shot_equals_a_graded_example() -> None:
    """Test-only tasks have put the graded document into its own prompt, and copies of documents do the same."""
    rows = [*records(30), *({**row, "q": row["q"].upper() + " "} for row in records(30))]
    mine = task(rows=rows)
    for seed in range(5):
        split = split_items(mine, 4)
        shots = split.shots("", 4, seed, "mine")
        assert len({shot.content_hash for shot in shots}) == 4
        graded = {item.content_hash for item in split.graded}
        assert not graded & {item.content_hash for item in split.pool[""]}
        for item in split.graded:
            assert item.prompt not in prompt_text(mine, item, shots).removesuffix(item.prompt)
    assert len(split.graded) + split.excluded == 60
    assert len(split_items(mine, 0).graded) == 60  # without shots all are graded


def test_shots_of_a_source_of_their_own_are_checked_too() -> None:
    rows = records(12)
    source = {"rows": [rows[3], *({**row, "q": f"other {i}"} for i, row in enumerate(rows[:6])), rows[0]]}
    split = split_items(task(rows=rows, shots={"source": source}), 5)
    assert len(split.graded) == 12
    assert split.excluded == 2
    assert all(item.record["q"].startswith("other") for item in split.pool[""])
    with pytest.raises(UsageError, match="mine has 6 examples to take shots from, not 7"):
        split_items(task(rows=rows, shots={"source": source}), 7)


def test_fixed_shots_keep_their_order_and_are_not_graded() -> None:
    rows = records(12)
    mine = task(rows=rows, shots={"fixed": [rows[5], rows[2]]})
    split = split_items(mine, 2)
    assert [shot.record for shot in split.shots("", 2, 7, "mine")] == [rows[5], rows[2]]
    assert [item.index for item in split.graded] == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]
    assert len(run_tasks(model(), BPE, [mine], shots=(2,), seeds=(0, 1)).tasks) == 1  # nothing is drawn


def test_shots_that_are_not_drawn_are_all_used() -> None:
    """A shot of MMLU's college_physics is one of its questions."""
    rows = [{**row, "subject": "ab"[i % 2]} for i, row in enumerate(records(8))]
    source = {"rows": [rows[4], {**rows[0], "q": "other"}, {**rows[1], "subject": "a"}, rows[3]]}
    mine = task(rows=rows, group="{{ subject }}", shots={"source": source, "draw": False})
    split = split_items(mine, 1)
    assert [shot.record for shot in split.shots("a", 3, 0, "mine")] == [rows[4], source["rows"][1], source["rows"][2]]
    assert [item.index for item in split.graded] == [0, 1, 2, 5, 6, 7]  # 1 is a question of b, and a shot of a
    assert split.excluded == 2


def test_shots_come_from_the_same_group() -> None:
    rows = [{**row, "subject": "ab"[i % 2]} for i, row in enumerate(records(40))]
    split = split_items(task(rows=rows, group="{{ subject }}"), 3)
    for group in "ab":
        assert {shot.group for shot in split.shots(group, 3, 0, "mine")} == {group}
    with pytest.raises(UsageError, match="mine has 20 examples of a, which are too few for 11 shots"):
        split_items(task(rows=rows, group="{{ subject }}"), 11)


def test_a_draw_is_the_same_each_time_and_longer_ones_begin_with_shorter_ones() -> None:
    split = split_items(task(100), 8)
    eight = split.shots("", 8, 1, "mine")
    assert split.shots("", 3, 1, "mine") == eight[:3]
    assert split.shots("", 8, 1, "mine") == eight
    assert split.shots("", 8, 2, "mine") != eight


def test_the_prompt_is_header_shots_and_question() -> None:
    rows = records(12)
    mine = task(rows=rows, shots={"fixed": rows[:2], "header": "About {{ q.split()[0] }}.\n\n", "separator": "\n###\n"})
    split = split_items(mine, 2)
    item = split.graded[0]
    text = prompt_text(mine, item, split.shots("", 2, 0, "mine"))
    shots = [f"Q: {row['q']}\nA: {row['options'][row['right']]}" for row in rows[:2]]
    assert text == f"About {item.record['q'].split()[0]}.\n\n" + "\n###\n".join([*shots, item.prompt])


def test_whole_shots_are_removed_from_long_prompts_and_it_is_said() -> None:
    mine = task(24)
    split = split_items(mine, 4)
    shots = split.shots("", 4, 0, "mine")
    item = split.graded[0]
    longest = max(
        len(pair.context) + len(pair.ids) - 1
        for pair in encode_pairs(BPE, [(prompt_text(mine, item, shots[1:]), f" {c}") for c in item.choices])
    )
    results = run_tasks(model(longest), BPE, [mine], shots=(4,))
    first = results.tasks[0].outcomes[0]
    assert first.shots == 3
    assert first.prompt_sha256 == harness._sha256(prompt_text(mine, item, shots[1:]))
    assert "have fewer, since the context is too short" in results.table()
    assert results.tasks[0].description["fewer_shots"] == results.tasks[0].fewer_shots > 0
    with pytest.raises(DataError, match="mine: example 0 has .* tokens even without shots"):
        run_tasks(model(8), BPE, [mine])


# Other kinds ----------------------------------------------------------------------------------------------------------


def test_cloze_is_right_if_the_model_would_write_the_answer() -> None:
    network = model()
    prompt = "Q: river stone"
    ids = BPE.encode(prompt)
    with torch.no_grad():
        best = int(network(torch.tensor([ids]))[0, -1].argmax())
    written = BPE.decode([best])
    rows = [{"text": prompt, "last": written}, {"text": prompt, "last": " meadow"}]
    mine = task(rows=rows, kind="cloze", prompt="{{ text }}", choices=None, answer="last", separator="")
    result = run_tasks(network, BPE, [mine]).tasks[0]
    assert [outcome.score for outcome in result.outcomes] == [1.0, 0.0]
    assert [outcome.answer for outcome in result.outcomes] == [written, ""]
    assert result.outcomes[1].logprobs[0] == pytest.approx(logprob(network, BPE, prompt, " meadow"), abs=1e-4)
    assert result.chance is None


def test_a_continuation_is_scored_after_each_choice() -> None:
    network = model()
    rows = [{"q": "river", "options": ["stone", "cloud"], "right": 0, "end": "is snow"}] * 2
    mine = task(rows=rows, prompt="{{ q }}", continuation="{{ end }}", normalization="raw")
    result = run_tasks(network, BPE, [mine]).tasks[0]
    expected = [logprob(network, BPE, f"river {choice}", " is snow") for choice in ("stone", "cloud")]
    assert result.outcomes[0].logprobs == pytest.approx(expected, abs=1e-4)


def test_choices_without_a_prompt() -> None:
    network = model()
    texts = ["river is sand", "river sand is"]
    rows = [{"options": texts, "right": 0}] * 2
    mine = task(rows=rows, prompt="", normalization="raw")
    result = run_tasks(network, BPE, [mine]).tasks[0]
    expected = [logprob(network, BPE, "", choice) for choice in texts]
    assert result.outcomes[0].logprobs == pytest.approx(expected, abs=1e-4)


def test_generated_answers() -> None:
    network = model()
    prompt = "Q: river 0\nA:"
    written = gptsmith.generate(network, BPE, prompt, temperature=0.0, max_tokens=12, stop="\n")
    rows = [{"q": "river 0", "right": written}, {"q": "river 0", "right": "nothing"}]
    keys: dict[str, Any] = {"kind": "generation", "choices": None, "max_tokens": 12}
    mine = task(rows=rows, metric="exact_match", **keys)
    result = run_tasks(network, BPE, [mine]).tasks[0]
    assert [outcome.answer for outcome in result.outcomes] == [written, written]
    assert [outcome.score for outcome in result.outcomes] == [1.0, 0.0]
    with pytest.raises(DataError, match="no room for 12 more in the context of 16"):
        run_tasks(model(16), BPE, [mine])


def test_stop_strings_end_each_answer_and_no_other() -> None:
    network = model()
    keys: dict[str, Any] = {"kind": "generation", "choices": None, "max_tokens": 24, "metric": "exact_match"}
    rows = [{"q": word, "right": "x"} for word in WORDS]
    whole = [o.answer for o in run_tasks(network, BPE, [task(rows=rows, stop=[], **keys)]).tasks[0].outcomes]
    stops = [whole[0][3:5], whole[1][5:7]]
    found = run_tasks(network, BPE, [task(rows=rows, stop=stops, **keys)]).tasks[0].outcomes
    for text, outcome in zip(whole, found, strict=True):
        ends = [text.index(stop) for stop in stops if stop in text]
        assert outcome.answer == (text[: min(ends)] if ends else text)
    assert {len(outcome.answer) for outcome in found} != {len(text) for text in whole}


def test_several_answers_give_pass_at_k(tmp_path: Path) -> None:
    (tmp_path / "scorer.py").write_text("def vowels(text, item):\n    return float('r' in text)\n")
    values = {
        "source": {"rows": records(6)},
        "kind": "generation",
        "prompt": "{{ q }}",
        "metric": {"python": "scorer.py:vowels"},
        "max_tokens": 4,
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    results = run_tasks(model(), BPE, [tmp_path / "mine.yaml"], samples=4, temperature=1.5)
    first, second = results.summary()
    outcomes = results.tasks[0].outcomes
    counts = [sum("r" in text for text in outcome.texts) for outcome in outcomes]
    assert [outcome.samples for outcome in outcomes] == [tuple(float("r" in t) for t in o.texts) for o in outcomes]
    assert 0 < sum(counts) < 24
    assert (first.metric, second.metric) == ("pass@1", "pass@4")
    assert first.score == pytest.approx(sum(counts) / 24)
    assert second.score == pytest.approx(sum(count > 0 for count in counts) / 6)
    again = run_tasks(model(), BPE, [tmp_path / "mine.yaml"], samples=4, temperature=1.5)
    assert again.tasks[0].outcomes == outcomes
    for options, message in (({"samples": 0}, "at least 1"), ({"samples": 2, "temperature": 0.0}, "the same answer")):
        with pytest.raises(UsageError, match=message):
            run_tasks(model(), BPE, [tmp_path / "mine.yaml"], **options)


def test_a_python_scorer_beside_the_task(tmp_path: Path) -> None:
    (tmp_path / "scorer.py").write_text("def half(text, item):\n    return 0.5 if item.record['q'] else 0\n")
    text = json.dumps(
        {
            "source": {"rows": records(2)},
            "kind": "generation",
            "prompt": "{{ q }}",
            "metric": {"python": "scorer.py:half"},
            "max_tokens": 3,
        }
    )
    (tmp_path / "mine.yaml").write_text(text)
    assert run_tasks(model(), BPE, [tmp_path / "mine.yaml"]).tasks[0].score == 0.5


def test_chat_templates_are_used_only_if_asked_for() -> None:
    network, mine = model(), task(6)
    chat = Tokenizer(BPE.to_json(), {**BPE.config(), "chat_template": TEMPLATE})
    plain = run_tasks(network, chat, [mine]).tasks[0]
    assert plain.outcomes == run_tasks(network, BPE, [mine]).tasks[0].outcomes
    asked = run_tasks(network, chat, [mine], chat=True).tasks[0]
    prompt = f"[user] Q: {records(1)[0]['q']}\nA:\n[assistant]"
    ids, choice = chat.encode(prompt), chat.encode(records(1)[0]["options"][0])
    with torch.no_grad():
        logprobs = network(torch.tensor([[*ids, *choice[:-1]]])).log_softmax(dim=-1)[0, len(ids) - 1 :]
    expected = float(logprobs.gather(1, torch.tensor(choice)[:, None]).sum())
    assert asked.outcomes[0].logprobs[0] == pytest.approx(expected, abs=1e-4)
    assert asked.description["chat"] is True
    with pytest.raises(UsageError, match="the model has none"):
        run_tasks(network, BPE, [mine], chat=True)


def test_controls_score_the_choices_without_the_question() -> None:
    network = model()
    results = run_tasks(network, BPE, [task(12, normalization="raw")], controls=True)
    for outcome, row in zip(results.tasks[0].outcomes, records(12), strict=True):
        values = [logprob(network, BPE, "Answer:", f" {choice}") for choice in row["options"]]
        assert outcome.unconditional == pytest.approx(values, abs=1e-4)
        assert outcome.control == (values.index(max(values)) == row["right"])
    (row_of_table,) = results.summary()
    assert row_of_table.control == sum(outcome.control or 0 for outcome in results.tasks[0].outcomes) / 12
    assert "no question" in results.table()


# Results --------------------------------------------------------------------------------------------------------------


def test_results_say_everything() -> None:
    network = model()
    results = run_tasks(network, BPE, [task()], shots=(0, 2), seeds=(3, 4), name="tiny")
    assert [(each.shots, each.seed) for each in results.tasks] == [(0, 3), (2, 3), (2, 4)]
    first, second = results.summary()
    assert (first.shots, first.draws, second.draws) == (0, 1, 2)
    assert second.score == pytest.approx((results.tasks[1].score + results.tasks[2].score) / 2)
    assert first.low <= first.score <= first.high
    written = json.loads(json.dumps(results.to_json()))
    assert written["model"] == "tiny"
    assert written["model_sha256"] == weights_sha256(network) != weights_sha256(model(seed=1))
    entry = written["tasks"][1]
    split = split_items(task(), 2)
    prompt = prompt_text(task(), split.graded[0], split.shots("", 2, 3, "mine"))
    assert entry["first_prompt"] == prompt
    ids = BPE.encode(prompt)
    assert entry["first_tokens"] == [BPE.token_text(id) for id in ids[:12]]
    assert entry["last_tokens"] == [BPE.token_text(id) for id in ids[-12:]]
    assert entry["definition"]["prompt"] == "Q: {{ q }}\nA:"
    assert [outcome["index"] for outcome in entry["outcomes"]] == [item.index for item in split.graded]


def test_an_interrupted_evaluation_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ITEMS_AT_ONCE", 4)
    network, mine = model(), task(20)
    whole = run_tasks(network, BPE, [mine], shots=(1,))
    scored: list[int] = []
    original = harness._Evaluation._scored

    def scored_until(limit: int) -> Any:
        def run(self: Any, task: Any, items: Any, shots: Any) -> Any:
            if len(scored) >= limit:
                raise KeyboardInterrupt
            scored.extend(item.index for item in items)
            return original(self, task, items, shots)

        return run

    monkeypatch.setattr(harness._Evaluation, "_scored", scored_until(8))
    with pytest.raises(KeyboardInterrupt):
        run_tasks(network, BPE, [mine], shots=(1,), log=tmp_path)
    monkeypatch.setattr(harness._Evaluation, "_scored", scored_until(10_000))
    resumed = run_tasks(network, BPE, [mine], shots=(1,), log=tmp_path)
    assert sorted(scored) == [outcome.index for outcome in whole.tasks[0].outcomes]  # none twice
    assert resumed.to_json() == whole.to_json()
    variants: list[dict[str, Any]] = [
        {"model": model(seed=1)},
        {"seeds": (1,)},
        {"shots": (2,)},
        {"controls": True},
        {"tasks": [task(20, normalization="raw")]},
        {"tasks": [task(20, separator=" is ")]},
        {"tasks": [task(20, rows=records(21)[1:])]},
    ]
    for number, changed in enumerate(variants, start=2):
        arguments: dict[str, Any] = {"model": network, "tasks": [mine], "shots": (1,), **changed}
        run_tasks(tokenizer=BPE, log=tmp_path, **arguments)
        assert len(list(tmp_path.iterdir())) == number  # none of the outcomes is taken


def test_unfinished_lines_of_the_log_are_computed_again(tmp_path: Path) -> None:
    network, mine = model(), task(10)
    whole = run_tasks(network, BPE, [mine], log=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-20])
    again = run_tasks(network, BPE, [mine], log=tmp_path)
    assert again.tasks[0].outcomes[:-1] == whole.tasks[0].outcomes[:-1]
    assert again.tasks[0].outcomes[-1].logprobs == pytest.approx(whole.tasks[0].outcomes[-1].logprobs, abs=1e-4)


def test_evaluate_is_part_of_the_package() -> None:
    package: Any = gptsmith
    results = package.evaluate(model(), BPE, task(6), shots=(1,))  # a module, too, which is all that mypy sees
    assert isinstance(results, Results)
    assert results.tasks[0].shots == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "no task is given"),
        ({"tasks": ["hela_swag"]}, "Did you mean 'hellaswag'"),
        ({"tasks": ["arithmetik"]}, "Did you mean 'arithmetic'"),
        ({"tasks": ["arithmetic", "arithmetic"]}, "given twice"),
        ({"tasks": ["arithmetic"], "shots": (2,)}, "arithmetic is a task without shots"),
        ({"shots": (-1,)}, "at least 0, not -1"),
        ({"shots": (1, 1)}, "different numbers, not 1, 1"),
        ({"shots": ()}, "different numbers, not none"),
        ({"seeds": ()}, "at least one"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"samples": 2}, "none of the tasks has any"),
        ({"temperature": 0.5}, "none of the tasks has any"),
        ({"tasks": ["arithmetic"], "controls": True}, "none of the tasks has choices"),
        ({"shots": (16,)}, "has 30 examples, which are too few for 16 shots"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_tasks(model(), BPE, **{"tasks": [task()], **options})


def test_characters_that_the_tokenizer_lacks_are_named_with_the_example() -> None:
    tokenizer = train_char(["Q: A\n river"])
    network = tiny_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    with pytest.raises(TokenizerError, match="mine: example 0: .*"):
        run_tasks(network, tokenizer, [task(4)])
