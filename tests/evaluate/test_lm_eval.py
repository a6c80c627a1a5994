"""gptsmith as a model of lm-evaluation-harness: equal, item by item, to the harness with transformers."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gptsmith.errors import TokenizerError, UsageError
from tests.foreign import byte_level, sentencepiece, unigram, write_model

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the harness and of what it imports
pytest.importorskip("lm_eval", reason="lm_eval[api] is not installed")
SAMPLES, CONTEXT = 6, 96
TEXT = (
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a house by the sea, and in it lived an old"
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KINDS: dict[str, tuple[Any, dict[str, Any], str, dict[str, Any]]] = {
    "byte-level": (
        byte_level,
        {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE},
        "gpt2",
        {"eos_token_id": 0, "n_positions": CONTEXT},
    ),
    "sentencepiece": (
        sentencepiece,
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": "{{ bos_token }}" + TEMPLATE.replace("<|im_end|>", "</s>").replace("<|im_start|>", "<s>"),
        },
        "llama",
        {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": CONTEXT},
    ),
    "unigram": (
        unigram,
        {"eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE.replace("<|im_end|>", "</s>")},
        "llama",
        {"eos_token_id": 1, "max_position_embeddings": CONTEXT},
    ),
}


@pytest.fixture(scope="module", params=list(KINDS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make, tokenizer_config, model_type, settings = KINDS[request.param]
    write_model(path, model_type, make(), tokenizer_config, **settings)
    return path


def documents(**_: Any) -> dict[str, Any]:
    from datasets import Dataset

    draw, words = random.Random(0), TEXT.split()
    rows = [
        {
            "question": " ".join(draw.choices(words, k=draw.randint(1, 9))) + draw.choice(["", " ", "\n", "?"]),
            "choices": [" ".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(3)],
            "long": " ".join(draw.choices(words, k=90)),
            "answer": draw.randrange(3),
        }
        for _ in range(SAMPLES)
    ]
    return {"test": Dataset.from_list(rows)}


def tasks() -> list[dict[str, Any]]:
    common = {"custom_dataset": documents, "test_split": "test"}
    choices = {
        **common,
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    generation = {
        **common,
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": [" the", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    return [
        {**choices, "task": "choices", "doc_to_text": "{{question}}"},
        {**choices, "task": "too_long", "doc_to_text": "{{long}} {{question}}"},
        {
            **common,
            "task": "continuations",
            "output_type": "loglikelihood",
            "doc_to_text": "{{'' if answer == 1 else question}}",
            "doc_to_target": " {{choices[0]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        {
            **common,
            "task": "texts",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}} {{long if answer else choices[0]}} {{question}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        {**generation, "task": "answers", "doc_to_text": "{{question}}:"},
        {**generation, "task": "long_answers", "doc_to_text": "{{long}} {{question}}"},
    ]


def evaluate(backend: str, arguments: dict[str, Any], **options: Any) -> dict[str, list[dict[str, Any]]]:
    """Return the harness's samples of each task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import gptsmith.evaluate.lm_eval  # noqa: F401  # registers the model

    made = lm_eval.simple_evaluate(
        model=backend,
        model_args=arguments,
        tasks=tasks(),
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    assert made is not None
    return {
        task: sorted(samples, key=lambda sample: int(sample["doc_id"])) for task, samples in made["samples"].items()
    }


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_equal_item_by_item(directory: Path, chat: bool) -> None:
    """Without and with chat templates, in contexts that fit and that are cut."""
    options = {"apply_chat_template": True, "system_instruction": "Be brief."} if chat else {}
    theirs = evaluate("hf", {"pretrained": str(directory), "dtype": "float32", "batch_size": 2}, **options)
    ours = evaluate("gptsmith", {"pretrained": str(directory)}, **options)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 6
    for task, samples in ours.items():
        assert len(samples) == SAMPLES
        for own, other in zip(samples, theirs[task], strict=True):
            assert own["arguments"] == other["arguments"]
            assert _flat(own["resps"]) == [
                pytest.approx(each, rel=1e-4, abs=1e-4) if isinstance(each, float) else each
                for each in _flat(other["resps"])
            ]
            for metric in ("acc", "acc_norm", "exact_match"):
                assert own.get(metric) == other.get(metric)


def _flat(value: Any) -> list[Any]:
    return [each for item in value for each in _flat(item)] if isinstance(value, list | tuple) else [value]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_model(path, "llama", sentencepiece(), special, bos_token_id=1, max_position_embeddings=CONTEXT)
    return path


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def make(path: Path, **options: Any) -> Any:
    from gptsmith.evaluate.lm_eval import GptsmithLM

    return GptsmithLM(str(path), device="cpu", **options)


def test_a_beginning_of_sequence_comes_once(llama: Path) -> None:
    model = make(llama)
    plain = model.own_tokenizer.encode("the fox")
    assert model.tok_encode("the fox") == [1, *plain]
    assert model.tok_encode("<s>the fox") == [1, *plain]
    assert model.tok_encode("the fox", add_special_tokens=False) == plain
    assert make(llama, add_bos_token=False).tok_encode("the fox") == plain
    context, continuation = model._encode_pair("the", " fox")
    assert context.count(1) == 1
    assert 1 not in continuation


def test_a_boundary_inside_a_token_is_scored(tmp_path: Path) -> None:
    """The context ends inside a token of the whole text, which leaves no token after its own."""
    write_model(tmp_path, "gpt2", byte_level(), {"eos_token": "<|endoftext|>"})
    model = make(tmp_path)
    tokens = {model.own_tokenizer.token_text(id): id for id in range(model.own_tokenizer.vocab_size)}
    whole = next(text for text in tokens if text.strip() == text and text.isalpha() and len(text) == 3)
    pairs = [(whole[:cut], whole[cut:]) for cut in (1, 2)]
    scores = model.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    assert all(score < 0 for score, _ in scores)


def test_sampled_texts(llama: Path) -> None:
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_k": 50}
    requests = [Request("Once", options), Request("Once", options), Request("The", options)]
    model = make(llama)
    texts = model.generate_until(requests)
    assert texts[0] != texts[1]  # repetitions are different samples
    assert model.generate_until(requests) == texts  # but the same in every evaluation
    assert make(llama, seed=5).generate_until(requests) != texts


def test_what_this_model_does_not_have_is_refused(llama: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"revision": "main"}, "has no argument revision"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"max_length": CONTEXT + 1}, "max_length must be between 1 and the context of 96"),
    ):
        with pytest.raises(UsageError, match=message):
            make(llama, **options)
    model = make(llama)
    with pytest.raises(UsageError, match="cannot generate with num_beams"):
        model.generate_until([Request("The", {"num_beams": 3, "max_gen_toks": 4})])
    with pytest.raises(UsageError, match="leave no room for a prompt in the context of 96"):
        model.generate_until([Request("The", {"max_gen_toks": 96})])
    with pytest.raises(UsageError, match="no chat template"):
        model.apply_chat_template([{"role": "user", "content": "Hello"}])
    with pytest.raises(UsageError, match="is empty"):
        model._loglikelihood_tokens([(None, [1], [])])


def test_characters_that_the_tokenizer_lacks_are_errors(tmp_path: Path) -> None:
    from gptsmith.checkpoint import save_checkpoint
    from gptsmith.tokenizer import train_char
    from tests.factories import tiny_model

    tokenizer = train_char(["abc "])
    save_checkpoint(tmp_path / "it", tiny_model(vocab_size=tokenizer.vocab_size), tokenizer)
    model = make(tmp_path / "it")
    for text in ("abd", "ab<|endoftext|>d"):
        with pytest.raises(TokenizerError, match="'d'|'<'"):
            model.loglikelihood([Request(text, " a")], disable_tqdm=True)


def tiny_task(folder: Path) -> dict[str, Any]:
    """Return a task over `rows.jsonl` in a folder."""
    return {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "c",
        "doc_to_target": "a",
    }


def test_the_command_line(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.tasks

    from gptsmith.evaluate.lm_eval import main

    # Looking through all the harness's own tasks takes half a minute.
    only_own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", only_own)
    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "rows.jsonl").write_text('{"q": "The quick", "c": ["fox", "dog"], "a": 0}\n' * 3)
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_task(tmp_path)))
    options = ["--model", "gptsmith", "--tasks", "tiny", "--include_path", str(tmp_path), "--log_samples"]
    options += ["--output_path", str(tmp_path / "out"), "--model_args"]
    assert main([*options, f"pretrained={llama}"]) == 0
    (samples,) = (tmp_path / "out").rglob("samples_tiny_*.jsonl")
    assert len(samples.read_text().splitlines()) == 3
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert "model_sha" in json.loads(results.read_text())["config"]
    assert main([*options, f"pretrained={tmp_path / 'nowhere'}"]) == 1
    assert "error: there is no model at" in capsys.readouterr().err


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which the package's entry points are those of this tree's pyproject.toml."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "installed" / "gptsmith_entry_points-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gptsmith-entry-points\nVersion: 0\n")
    (group,) = project["entry-points"].items()
    lines = [f"[{group[0]}]", *(f"{name} = {target}" for name, target in group[1].items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    path = os.pathsep.join([str(metadata.parent), *sys.path])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def test_the_harness_finds_the_model_by_its_name(installed: dict[str, str]) -> None:
    look = "import lm_eval, torch; from lm_eval.api.registry import get_model as m; print(m('gptsmith'), m('dummy'))"
    out = subprocess.run([sys.executable, "-c", look], env=installed, check=True, capture_output=True, text=True).stdout
    assert "GptsmithLM" in out
    assert "DummyLM" in out  # its own models are still there


@pytest.mark.slow
def test_the_harnesss_own_command(llama: Path, tmp_path: Path, installed: dict[str, str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "The quick", "c": ["fox", "dog"], "a": 0}\n' * 3)
    (tmp_path / "tiny.yaml").write_text(json.dumps(tiny_task(tmp_path)))
    command = [str(Path(sys.executable).with_name("lm_eval")), "--model", "gptsmith", "--tasks", "tiny"]
    command += ["--include_path", str(tmp_path), "--model_args", f"pretrained={llama}"]
    done = subprocess.run(command, env=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|tiny|" in done.stdout
