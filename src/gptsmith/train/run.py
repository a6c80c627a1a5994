"""A training run on disk: its directory, its record, and how it is started and resumed.

runs/bard/run.json         the resolved configuration, the model, the data, the machine, the outcome
runs/bard/tokenizer/       made before the first step
runs/bard/metrics.jsonl    losses, learning rate, speed
runs/bard/samples.jsonl    what the model wrote along the way
runs/bard/checkpoints/     model directories, each with its train/ folder
runs/bard/report.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gptsmith
from gptsmith.checkpoint import CheckpointStore, load_train_state
from gptsmith.config import from_dict, to_dict
from gptsmith.data.prepare import prepare
from gptsmith.data.shards import Dataset
from gptsmith.data.sources import Source, open_source
from gptsmith.engine.sampling import SamplingParams
from gptsmith.engine.text import engine_for, stream
from gptsmith.errors import (
    CheckpointError,
    DivergedError,
    GptsmithError,
    TokenizerError,
    TrainingError,
    UsageError,
    nearest,
)
from gptsmith.formats.hf import load_model_weights, read_config
from gptsmith.log import JsonLines, note
from gptsmith.model.config import ModelConfig
from gptsmith.model.loss import token_loss_sum
from gptsmith.model.transformer import Transformer
from gptsmith.runtime import (
    choose_device,
    choose_precision,
    compiler_available,
    describe_machine,
    keep_freed_memory,
    out_of_memory,
    synchronize,
)
from gptsmith.storage import explain_os_errors, remove_temporaries, write_text
from gptsmith.tokenizer import Tokenizer, gpt2_tokenizer, train_bpe, train_char
from gptsmith.train.budget.deadline import Deadline
from gptsmith.train.budget.parse import Budget
from gptsmith.train.budget.recipe import (
    LONG_TEXT,
    MOST_CHARACTERS,
    Text,
    choose,
    tokenizer_for,
)
from gptsmith.train.compile import compile_blocks, pays, undo_compile
from gptsmith.train.config import TrainConfig
from gptsmith.train.display import Display
from gptsmith.train.forecast.memory import fit
from gptsmith.train.fp8 import use_fp8
from gptsmith.train.objectives.pretrain import Pretrain
from gptsmith.train.signals import StopSignal
from gptsmith.train.step import optimizers_for, this_machine, usual_rate
from gptsmith.train.trainer import Outcome, Trainer

SAMPLE_CHARACTERS = 2_000_000  # of a text, by which its alphabet is judged
REPORT_TEMPERATURES = (0.2, 0.8, 1.2)

# What may differ between a run and its resumption without changing what it computes.
CHANGEABLE = frozenset({"keep_checkpoints", "sample_tokens", "sample_prompt", "device"})


@dataclass(frozen=True)
class Run:
    """A run's directory and the contents of its run.json."""

    directory: Path
    record: dict[str, Any]

    @property
    def config(self) -> TrainConfig:
        return from_dict(TrainConfig, self.record["config"])

    def update(self, **values: Any) -> None:
        self.record.update(values)
        write_text(self.directory / "run.json", json.dumps(self.record, indent=2) + "\n")


class Ended(NamedTuple):
    """How training ended; `signal` is the number of the one that interrupted it, or 0."""

    run: Run
    outcome: Outcome
    signal: int


def read_run(directory: Path) -> Run:
    """The run in `directory`. CheckpointError if there is none or its run.json is damaged."""
    path = Path(directory) / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        run = Run(Path(directory), {**record, "config": dict(record["config"]), "data": dict(record["data"])})
        for part, keys in ((record, ("status", "precision")), (record["data"], ("spec", "val", "fingerprint"))):
            for key in keys:
                _ = part[key]
        _ = run.config
        return run
    except UsageError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{directory} is not a run: it has no run.json.") from None
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}.") from None


def choose_directory(out: Path | None, source: Source) -> Path:
    """Where a new run goes: `out`, which must be empty or absent, or the first free runs/NAME[-N]."""
    if out is None:
        number = 1
        while (path := Path("runs") / (source.name if number == 1 else f"{source.name}-{number}")).exists():
            number += 1
        return path
    if (out / "run.json").exists():
        raise UsageError(
            f"{out} already holds a run. Continue it with `gptsmith train --resume {out}`, or choose another --out."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty directory. Choose another --out.")
    return out


def make_tokenizer(config: TrainConfig, train: Source, val: Source | None) -> Tokenizer:
    """The tokenizer a run asks for. A char alphabet comes from all the text; bpe merges from the training text only."""
    if config.tokenizer == "char":
        sources = [train] if val is None else [train, val]
        return train_char((piece.text for s in sources for piece in s.pieces()), unknown=config.unknown)
    if config.tokenizer == "bpe":
        return train_bpe(_training_part(train, 0.0 if val is not None else config.val_fraction), config.vocab_size)
    return ready_tokenizer(config.tokenizer)


def ready_tokenizer(name: str) -> Tokenizer:
    """A tokenizer that is not made from the text: gpt2, or a directory's."""
    if name == "gpt2":
        return gpt2_tokenizer()
    if not Path(name).exists():
        near = nearest(name, ("char", "bpe", "gpt2"))
        raise UsageError(f"--tokenizer {name}: use char, bpe, gpt2, or a directory with tokenizer.json.{near}")
    return Tokenizer.load(Path(name))


def read_text(data: str, config: TrainConfig, given: Collection[str] = ()) -> tuple[Tokenizer, Dataset]:
    """The data of a run, tokenized as the run would. given: as for `start`."""
    source = open_source(data, field=config.field)
    val = open_source(config.val, field=config.field) if config.val else None
    config = settle_tokenizer(config, given, source)
    tokenizer = make_tokenizer(config, source, val)
    return tokenizer, prepare(source, tokenizer, val=val, val_fraction=config.val_fraction)


def settle_tokenizer(config: TrainConfig, given: Collection[str], source: Source) -> TrainConfig:
    """With the tokenizer that suits a text and a budget, by the text's length and how many characters it is made of."""
    if config.budget is None or config.tokenizer != "char" or "tokenizer" in given:
        return config
    alphabet: set[str] = set()
    length = 0
    for piece in source.pieces():
        alphabet.update(piece.text)
        length += len(piece.text)
        if length >= LONG_TEXT:
            break
    rate = usual_rate(choose_device(config.device))
    kind, size = tokenizer_for(length, len(alphabet), Budget.parse(config.budget), rate)
    if kind == "char":
        return config
    size = config.vocab_size if "vocab_size" in given else size
    why = f"more than {MOST_CHARACTERS} different characters" if len(alphabet) > MOST_CHARACTERS else "a long text"
    note(f"{why}: {size:,} byte pairs made from it instead of characters (--tokenizer char keeps those)")
    return dataclasses.replace(config, tokenizer="bpe", vocab_size=size)


def _training_part(source: Source, val_fraction: float) -> Iterator[str]:
    """The text of a source but for the last `val_fraction` of its characters, which validation will be cut from."""
    left = round(sum(len(piece.text) for piece in source.pieces()) * (1 - val_fraction))
    for piece in source.pieces():
        yield piece.text[:left]
        left -= len(piece.text)
        if left <= 0:
            return


def start(
    data: str,
    config: TrainConfig,
    out: Path | None = None,
    *,
    given: Collection[str] = (),
    began: float | None = None,
    on_end: Callable[[Path], object] = lambda directory: None,
) -> Ended:
    """Prepare `data`, make a run directory and train. `on_end(directory)` is called however training ends.

    given: names of options that a budget leaves as they are (`gptsmith.train.budget.recipe`).
    began: when a budget of time started (`time.monotonic()`); now, by default.
    Raises GptsmithError for anything wrong with the data, the options or the place; nothing is left behind then.
    """
    began = time.monotonic() if began is None else began
    if config.budget is not None:
        Budget.parse(config.budget)  # before any work is done for one that is none
    source = open_source(data, field=config.field)
    val = open_source(config.val, field=config.field) if config.val else None
    directory = choose_directory(out, source)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    if config.compile == "on" and not compiler_available(device):
        raise GptsmithError("--compile on needs a C++ compiler; g++ and clang++ are missing. Use --compile auto.")
    config = settle_tokenizer(config, given, source)
    tokenizer = make_tokenizer(config, source, val)
    dataset = prepare(source, tokenizer, val=val, val_fraction=config.val_fraction)
    keep_freed_memory()
    choice = None
    if config.budget is not None or config.depth is not None:
        text = Text(len(dataset.train), len(dataset.val), tokenizer.vocab_size)
        machine = this_machine(device, precision, config.compile)
        choice = choose(config, given, text, machine, spent=time.monotonic() - began)
        config = choice.config
        for reason in choice.reasons:
            note(reason)
    model_config = config.model.build(tokenizer.vocab_size, config.context)
    record = {
        "version": gptsmith.__version__,
        "status": "running",
        "started": _now(),
        "config": to_dict(config),
        "model": to_dict(model_config),
        "data": {
            "spec": str(data) if source.path is None else str(source.path.resolve()),
            "val": None if val is None else (config.val if val.path is None else str(val.path.resolve())),
            "fingerprint": dataset.fingerprint,
            "train_tokens": len(dataset.train),
            "val_tokens": len(dataset.val),
            "train_bytes": dataset.bytes_train,
            "val_bytes": dataset.bytes_val,
        },
        "precision": precision,
        "machine": describe_machine(),
    }
    if choice is not None:
        record["choice"] = {"reasons": choice.reasons, "pause": choice.pause, "ending": choice.ending}
    run = Run(directory, record)
    session = Session(run, config, tokenizer, dataset, model_config, device, began=began)
    with explain_os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        tokenizer.save(directory / "tokenizer")
        run.update(parameters=session.model.num_parameters())
        return session.train(on_end)


def resume(
    directory: Path, config: TrainConfig | None = None, *, on_end: Callable[[Path], object] = lambda directory: None
) -> Ended:
    """Continue the run in `directory` from its newest intact checkpoint, bit for bit.

    config: refused where it differs from the run's own in anything that changes what is computed.
    """
    run = read_run(directory)
    saved = run.config
    if config is not None:
        _refuse_changes(saved, config)
    config = config or saved
    store = CheckpointStore(directory)
    if run.record["status"] == "finished" and store.steps():
        raise UsageError(f"{directory} is finished: all {saved.steps} steps are done. Start a new run to train more.")
    tokenizer = Tokenizer.load(directory / "tokenizer")
    data = run.record["data"]
    source = open_source(data["spec"], field=config.field)
    val = open_source(data["val"], field=config.field) if data["val"] else None
    try:
        dataset = prepare(source, tokenizer, val=val, val_fraction=config.val_fraction)
        unchanged = dataset.fingerprint == data["fingerprint"]
    except TokenizerError:  # a character that was not there before
        unchanged = False
    if not unchanged:
        raise CheckpointError(
            f"the data of {directory} has changed since the run began ({data['spec']}). "
            "Put the text back as it was, or start a new run."
        )
    model_config = config.model.build(tokenizer.vocab_size, config.context)
    device = choose_device(config.device)
    keep_freed_memory()
    with _locked(directory):
        session = Session(run, config, tokenizer, dataset, model_config, device)
        step = session.restore() if store.steps() else 0
        store.delete_after(step)
        remove_temporaries(directory)
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (directory / name).exists():
                JsonLines(directory / name).truncate_after(step)
        note(f"resuming {directory} at step {step} of {session.trainer.steps}")
        run.update(status="running")
        return session.train(on_end)


def _refuse_changes(saved: TrainConfig, asked: TrainConfig) -> None:
    before, now = _flat(to_dict(saved)), _flat(to_dict(asked))
    changed = [name for name in before if before[name] != now[name] and name not in CHANGEABLE]
    if changed:
        what = ", ".join(f"{name} ({before[name]} → {now[name]})" for name in changed)
        raise UsageError(f"a resumed run keeps its settings; these differ: {what}. Leave them out, or start a new run.")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


class Session:
    """Everything one process needs to train a run."""

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        tokenizer: Tokenizer,
        dataset: Dataset,
        model_config: ModelConfig,
        device: torch.device,
        began: float | None = None,
    ) -> None:
        self.run, self.config, self.tokenizer = run, config, tokenizer
        # As the run has trained so far, if it has; smaller where that does not fit into memory here and now.
        micro_batch_size = fit(
            config,
            model_config,
            device=device,
            precision=run.record["precision"],
            micro_batch_size=run.record.get("micro_batch_size"),
        )
        run.record["micro_batch_size"] = micro_batch_size
        torch.manual_seed(config.seed)
        self.model = Transformer(model_config, dropout=config.dropout).to(device)
        if run.record["precision"] == "fp8":
            use_fp8(self.model)
        self.stop = StopSignal()
        self.store = CheckpointStore(run.directory)
        self.objective = Pretrain(
            dataset,
            batch_size=config.batch_size,
            seq_len=config.context,
            seed=config.seed,
            device=device,
            mask_documents=config.mask_documents,
            eval_tokens=config.eval_tokens,
            should_stop=self.stop,
        )
        self.optimizers = optimizers_for(self.model, config.optim)
        self.display = Display(config.steps)
        self.trainer = Trainer(
            config=config,
            model=self.model,
            tokenizer=tokenizer,
            objective=self.objective,
            optimizers=self.optimizers,
            store=self.store,
            precision=run.record["precision"],
            micro_batch_size=micro_batch_size,
            should_stop=self.stop,
            display=self.display,
            deadline=self._deadline(began),
            on_evaluation=self.preview,
        )

    def _deadline(self, began: float | None) -> Deadline | None:
        """For a budget of time: its end, counted from `began`, or from now where a run goes on."""
        budget = None if self.config.budget is None else Budget.parse(self.config.budget)
        if budget is None or budget.kind != "seconds":
            return None
        choice = self.run.record["choice"]
        before = 0.0 if began is None else time.monotonic() - began
        return Deadline(budget.amount, before=before, pause=choice["pause"], ending=choice["ending"])

    def restore(self) -> int:
        """Load the newest intact checkpoint; the step it is of."""
        directory = self.store.newest_intact()
        if read_config(directory) != self.model.config:
            raise CheckpointError(
                f"{directory} has another architecture than {self.run.directory / 'run.json'} describes. "
                "Start a new run to change the model."
            )
        load_model_weights(self.model, directory)
        self.trainer.restore(load_train_state(directory))
        self.display.first_step, self.display.steps = self.trainer.step, self.trainer.steps
        return self.trainer.step

    def train(self, on_end: Callable[[Path], object]) -> Ended:
        try:
            if "compile" not in self.run.record:  # decided once: a resumed run computes as the run did before
                self.run.update(compile=self._should_compile())
            with self.stop, self.display:
                if self.run.record["compile"]:
                    self._compile()
                outcome = self.trainer.run()
                self.run.update(status=outcome, ended=_now(), seconds=round(self.trainer.elapsed(), 1))
                if outcome == "finished":
                    self._final_samples()
        except TrainingError as error:
            with contextlib.suppress(Exception):  # the disk may be full, or the memory: what matters is the message
                self.run.update(status="diverged" if isinstance(error, DivergedError) else "failed")
                on_end(self.run.directory)
            raise
        try:
            on_end(self.run.directory)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            note(f"no memory for the report; the run is whole. Write it with: gptsmith report {self.run.directory}")
        return Ended(self.run, outcome, self.stop.number)

    def _compile(self) -> None:
        """Compile the blocks; if that fails, do without."""
        self.display.say("compiling")
        began = time.monotonic()
        compile_blocks(self.model)
        try:
            self._trial_pass()
        except TrainingError:
            raise
        except Exception as error:  # whatever a compiler, its headers or its runtime can do wrong on a machine
            undo_compile(self.model)
            if self.config.compile == "on":
                raise GptsmithError(f"--compile on failed: {_first_line(error)} Use --compile auto or off.") from error
            self.display.print(f"note: compiling failed, going on without: {_first_line(error)}")
            self.run.update(compile=False)
        self.trainer.elapsed_before += time.monotonic() - began

    def _should_compile(self) -> bool:
        """Whether compiling pays: where it is possible, and what it saves is well above what it costs."""
        device = next(self.model.parameters()).device
        if self.config.compile != "auto":
            return self.config.compile == "on"
        if not compiler_available(device):
            return False
        seconds = min(self._trial_pass() for _ in range(3))
        seconds *= self.config.batch_size // self.trainer.micro_batch_size
        return pays(seconds * (self.trainer.steps - self.trainer.step), device)

    def _trial_pass(self) -> float:
        """Seconds of one micro-batch's forward and backward pass. Leaves no trace in gradients or random numbers, but
        smaller micro-batches where memory ran out."""
        random, device = self.trainer.random_state(), next(self.model.parameters()).device
        while True:
            ids = torch.zeros(self.trainer.micro_batch_size, self.config.context, dtype=torch.int64, device=device)
            began = time.perf_counter()
            try:
                with self.trainer.autocast():
                    loss = token_loss_sum(self.model.train(), ids, ids, None) / ids.numel()
                torch.autograd.backward(loss)
                synchronize(device)
                return time.perf_counter() - began
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error)
            finally:
                self.model.zero_grad(set_to_none=True)
                self.trainer.set_random_state(random)
            self.trainer.shrink(reason)

    # -- samples -------------------------------------------------------------------------------------------------------

    def _write_sample(self, temperature: float, length: int, *, final: bool) -> str:
        """Generate, note in samples.jsonl and return; an empty text, not noted, if asked to stop meanwhile."""
        prompt = self.config.sample_prompt
        try:
            self.tokenizer.encode(prompt)
        except TokenizerError:
            prompt = ""
        params = SamplingParams(max_tokens=length, temperature=temperature, seed=self.config.seed, overflow="shift")
        text = ""
        for piece in stream(engine_for(self.model, self.tokenizer, params), self.tokenizer, prompt, params):
            if self.stop():
                return ""
            text += piece.text
        JsonLines(self.run.directory / "samples.jsonl").append(
            step=self.trainer.step, temperature=temperature, prompt=prompt, text=text, final=final
        )
        return text

    def preview(self, step: int) -> None:
        if self.config.sample_tokens and step < self.trainer.steps:
            self.display.say("sampling")
            self.display.sample(self._write_sample(0.8, self.config.sample_tokens, final=False))

    def _final_samples(self) -> None:
        if self.config.sample_tokens:
            for temperature in REPORT_TEMPERATURES:
                self.display.say("sampling")
                text = self._write_sample(temperature, 2 * self.config.sample_tokens, final=True)
                if self.stop():
                    return
                self.display.print(f"at temperature {temperature}:")
                self.display.sample(text)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time in a run directory; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with explain_os_errors(directory), open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another process is training in {directory}. Wait for it or stop it first.") from None
        yield


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
