"""Small models as other programs write them: transformers' own classes with random weights, and several tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gptsmith.formats.gguf_tokenizer import merges_of_scores

TEXT = (
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a house by the sea, and in it lived an "
    "old man who said: \"I'll go, don't you?\" 1234567890 naïve café\n"
) * 8
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level(special: tuple[str, ...] = SPECIAL, size: int = 360) -> Pipeline:
    """A byte-level BPE, as in GPT-2, Qwen and Llama 3. Special tokens come first."""
    pipeline = Pipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator([TEXT], trainer)
    return pipeline


def sentencepiece(*, bos: bool = True, size: int = 400) -> Pipeline:
    """A BPE with byte fallback over "▁", as in Llama 2: <unk> 0, <s> 1, </s> 2. bos: put <s> before texts."""
    pipeline = Pipeline(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    pipeline.train_from_iterator([TEXT], trainer)
    description = json.loads(pipeline.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] < 3]
    model = description["model"]  # SentencePiece merges every pair that makes a token
    ranks = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(model["merges"])))}
    pieces = {token: ranks.get(token, -1e6) for token, id in model["vocab"].items() if id >= 259}
    model["merges"] = merges_of_scores(pieces, model["vocab"])
    pipeline = Pipeline.from_str(json.dumps(description))
    pipeline.pre_tokenizer = None
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    if bos:
        pipeline.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return pipeline


def unigram(text: str = TEXT, size: int = 200) -> Pipeline:
    """A Unigram over "▁", as in T5: <pad> 0, </s> 1, <unk> 2."""
    pipeline = Pipeline(models.Unigram())
    pipeline.normalizer = normalizers.NFKC()
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace()
    pipeline.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    pipeline.train_from_iterator([text], trainer)
    return pipeline


def wordpiece(text: str = TEXT, size: int = 200) -> Pipeline:
    """A WordPiece, as in BERT: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3."""
    pipeline = Pipeline(models.WordPiece(unk_token="[UNK]"))
    pipeline.normalizer = normalizers.BertNormalizer()
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pipeline.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    pipeline.train_from_iterator(
        [text], trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    return pipeline


def word_ends(text: str = TEXT, size: int = 200) -> Pipeline:
    """A BPE that marks the end of each word, as in GPT-1: <unk> 0."""
    pipeline = Pipeline(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pipeline.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    pipeline.train_from_iterator([text], trainer)
    return pipeline


def write_model(
    directory: Path,
    model_type: str = "llama",
    pipeline: Pipeline | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Write a random model of transformers and its tokenizer into `directory`; return the model, in eval mode.

    pipeline: the tokenizer; None: none. settings: of the configuration, besides a width of 32 and two layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if pipeline is not None:
        settings = {"vocab_size": max(pipeline.get_vocab(with_added_tokens=True).values()) + 1, **settings}
    if model_type in ("gpt2", "openai-gpt"):
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    else:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        if model_type == "deepseek_v3":
            sizes |= {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 12, "v_head_dim": 8}
            sizes |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 8}
            sizes |= {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
        if model_type in ("gemma3_text", "olmo2", "opt", "phi3", "smollm3"):  # theirs may be beyond the vocabulary
            sizes["pad_token_id"] = None
    config = AutoConfig.for_model(model_type, **{**sizes, "bos_token_id": None, "eos_token_id": None, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim == 1 else 0.0))
    model.save_pretrained(directory)
    if pipeline is not None:
        pipeline.save(str(directory / "tokenizer.json"))
        values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (directory / "tokenizer_config.json").write_text(json.dumps({**values, **(tokenizer_config or {})}))
    return model


def change_json(path: Path, **values: Any) -> None:
    """Change entries of a JSON file, or make it; `...` removes an entry."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    after = {key: value for key, value in {**before, **values}.items() if value is not ...}
    path.write_text(json.dumps(after), encoding="utf-8")


def greedy(model: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    """Return what transformers generates after `ids` at temperature 0."""
    made = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    new: list[int] = made[0, len(ids) :].tolist()
    return new
