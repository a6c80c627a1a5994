"""Log-probabilities of continuations, with the keys and values of shared prefixes computed once.

    scorer = Scorer(model)
    scores = scorer.score(encode_pairs(tokenizer, [("The sky is", " blue"), ("The sky is", " green")]))
    scores[0].total                                              # nats

The sequences of all requests form a tree: the header and the shots are its trunk, then come the questions, then the
choices. Each node is computed once, from the cached keys and values of the nodes above it, together with other nodes of
whatever length. Depth first, so that few nodes are in the cache at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptsmith.errors import GptsmithError, UsageError
from gptsmith.model.cache import Chunk, PagedBatch, PagedCache
from gptsmith.model.transformer import Transformer
from gptsmith.tokenizer import Tokenizer

TOKENS_AT_ONCE = 512  # in one forward pass
_LOGITS_AT_ONCE = 1 << 25  # 128 MB of float32
_MIN_CACHE = 1 << 13  # tokens


@dataclass(frozen=True)
class Continuation:
    """Token ids to score after others, of which there is at least one."""

    context: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ContinuationScore:
    """logprobs: of each id, in nats. greedy: whether each is the most probable token at its place."""

    logprobs: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of the whole continuation."""
        return math.fsum(self.logprobs)


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
    """Return the ids of contexts and their continuations, as lm-evaluation-harness encodes them.

    Spaces at the end of a context move to the continuation, since most tokens begin with their space. Context and
    continuation are encoded as one text, which is cut where the context alone ends. A tokenizer's beginning-of-sequence
    token comes first, once. An empty context is that token, or else the end-of-sequence token.
    Raises UsageError for a continuation without tokens, or an empty context if there is no such token.
    """
    texts: dict[str, int] = {}
    split: list[tuple[str, str]] = []
    for context, continuation in pairs:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        split.append((context, continuation))
        for text in (context, context + continuation):
            texts.setdefault(_without_prefix(tokenizer, text), len(texts))
    encoded = tokenizer.encode_batch(list(texts))

    def ids(text: str) -> list[int]:
        return [*tokenizer.prefix_ids, *encoded[texts[_without_prefix(tokenizer, text)]]]

    result = []
    for (context, continuation), (original, _) in zip(split, pairs, strict=True):
        whole = ids(context + continuation)
        before = ids(context) if original else list(tokenizer.prefix_ids)
        after = whole[len(before) :]
        if not after:  # the boundary is inside the last token: score from the first token that differs
            common = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
            before, after = whole[:common], whole[common:]
        if not after:
            raise UsageError(f"the continuation {continuation!r} of {context[-40:]!r} has no tokens of its own.")
        if not before:
            first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
            if first is None:
                raise UsageError(
                    f"{continuation[:40]!r} cannot be scored without a context: the tokenizer has no token that stands "
                    "for the beginning or the end of a text."
                )
            before = [first]
            if after[0] == first and len(after) > 1:
                after = after[1:]
        result.append(Continuation(tuple(before), tuple(after)))
    return result


def _without_prefix(tokenizer: Tokenizer, text: str) -> str:
    """Return a text without the spelling of the tokens that the tokenizer puts before it, so that they come once."""
    if tokenizer.prefix_ids:
        special = tokenizer.special_tokens()
        for id in tokenizer.prefix_ids:
            text = text.removeprefix(special.get(id, ""))
    return text


@dataclass(eq=False)
class _Node:
    """Tokens that follow those of the parent. start: the position of the first one.

    done: how many are computed. slots: where the keys and values of all tokens so far are, those of the parents first.
    wanted: for each position in the node, the requests that score a token after it.
    """

    tokens: tuple[int, ...]
    start: int
    parent: _Node | None
    children: list[_Node] = field(default_factory=list)
    done: int = 0
    slots: list[int] = field(default_factory=list)
    unfinished: int = 0
    wanted: dict[int, list[tuple[int, int]]] = field(default_factory=dict)


class Scorer:
    """Scores continuations with one model. Results do not depend on what else is scored, up to rounding.

    tokens_at_once: how many tokens a forward pass has at most.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None = None, *, tokens_at_once: int = TOKENS_AT_ONCE
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.context = model.config.max_position_embeddings
        self.tokens_at_once = tokens_at_once
        self.computed_tokens = 0
        """How many tokens have been computed, for statistics."""
        self._cache: PagedCache | None = None
        self._free: list[int] = []

    def score(
        self, requests: Sequence[Continuation], *, on_progress: Callable[[int], None] | None = None
    ) -> list[ContinuationScore]:
        """Return the score of each request. on_progress: called with how many more tokens are done.

        Raises UsageError for a request that is empty or longer than the context, GptsmithError where the model gives
        no numbers.
        """
        for request in requests:
            if not request.context or not request.ids:
                raise UsageError("a continuation needs at least one token, and one before it.")
            if (length := len(request.context) + len(request.ids) - 1) > self.context:
                raise UsageError(f"{length} tokens are more than the context of {self.context}.")
        if not requests:
            return []
        logprobs = [[0.0] * len(request.ids) for request in requests]
        greedy = [True] * len(requests)
        roots = _tree(requests)
        longest = max(len(request.context) + len(request.ids) - 1 for request in requests)
        self._reserve(longest + self.tokens_at_once)
        room = len(self._free)
        stack = roots[::-1]
        was_training = self.model.training
        self.model.eval()
        try:
            while stack:
                self._step(stack, longest, requests, logprobs, greedy, on_progress)
        finally:
            self.model.train(was_training)
            if stack:  # interrupted
                self._cache = None
        assert len(self._free) == room or stack, "every slot is free again"
        return [ContinuationScore(tuple(each), same) for each, same in zip(logprobs, greedy, strict=True)]

    def _reserve(self, tokens: int) -> None:
        """Make a cache for at least so many tokens."""
        if self._cache is not None and len(self._free) >= tokens:
            return
        weight = next(p for name, p in self.model.named_parameters() if name.endswith("norm.weight"))
        size = max(tokens, _MIN_CACHE)
        windows = len({self.model.config.window_of(i) for i in range(self.model.config.num_hidden_layers)})
        # Blocks of one token, so that sequences can part after any token.
        self._cache = PagedCache(self.model.config, [size] * windows, 1, device=weight.device, dtype=weight.dtype)
        self._free = list(range(size))[::-1]

    @torch.inference_mode()
    def _step(
        self,
        stack: list[_Node],
        longest: int,
        requests: Sequence[Continuation],
        logprobs: list[list[float]],
        greedy: list[bool],
        on_progress: Callable[[int], None] | None,
    ) -> None:
        """Compute the nodes on top of the stack, and push those below them."""
        assert self._cache is not None
        batch: list[tuple[_Node, int]] = []
        budget = self.tokens_at_once
        while stack and budget:
            node = stack[-1]
            size = min(len(node.tokens) - node.done, budget)
            if batch and len(self._free) < size + longest:  # the longest sequence must still fit
                break
            stack.pop()
            if not node.done:
                node.slots = [] if node.parent is None else list(node.parent.slots)
            node.slots += [self._free.pop() for _ in range(size)]
            batch.append((node, size))
            budget -= size
        chunks: list[Chunk] = []
        ids: list[int] = []
        rows: list[int] = []
        wanted: list[tuple[int, int, int]] = []  # row, request, place in its continuation
        groups = len(self._cache.windows)
        for node, size in batch:
            past = node.start + node.done
            chunks.append(Chunk(past, size, [node.slots] * groups))
            for position in range(past, past + size):
                for request, place in node.wanted.get(position, ()):
                    if not rows or rows[-1] != len(ids) + position - past:
                        rows.append(len(ids) + position - past)
                    wanted.append((len(rows) - 1, request, place))
            ids += node.tokens[node.done : node.done + size]
        device = self._cache.keys[0].device
        paged = PagedBatch(self._cache, chunks, self.context)
        hidden = self.model.hidden_states(torch.tensor([ids], device=device), cache=paged)[0]
        self.computed_tokens += len(ids)
        if rows:
            self._read(hidden[torch.tensor(rows, device=device)], wanted, requests, logprobs, greedy)
        for node, size in batch[::-1]:
            node.done += size
            if node.done < len(node.tokens):
                stack.append(node)
            elif node.children:
                node.unfinished = len(node.children)
                stack.extend(reversed(node.children))
            else:
                self._finish(node)
        if on_progress is not None:
            on_progress(len(ids))

    def _finish(self, node: _Node) -> None:
        """Free the slots of a node, and of the nodes above it that nothing else needs."""
        while True:
            self._free += node.slots[node.start :][::-1]
            node.slots = []
            if node.parent is None:
                return
            node.parent.unfinished -= 1
            if node.parent.unfinished:
                return
            node = node.parent

    def _read(
        self,
        hidden: Tensor,
        wanted: Sequence[tuple[int, int, int]],
        requests: Sequence[Continuation],
        logprobs: list[list[float]],
        greedy: list[bool],
    ) -> None:
        """Write the log-probabilities that the hidden states (R, C) predict."""
        at_once = max(1, _LOGITS_AT_ONCE // self.model.config.vocab_size)
        for start in range(0, len(hidden), at_once):
            part = [(row - start, request, place) for row, request, place in wanted if start <= row < start + at_once]
            logits: Tensor = self.model.lm_head(hidden[start : start + at_once]).float()
            targets = [requests[request].ids[place] for _, request, place in part]
            index = torch.tensor([row for row, *_ in part], device=logits.device)
            target = torch.tensor(targets, device=logits.device)
            values = logits[index, target] - logits.logsumexp(dim=-1)[index]
            best = (logits.argmax(dim=-1)[index] == target).tolist()
            for (_, request, place), value, is_best in zip(part, values.tolist(), best, strict=True):
                if not math.isfinite(value):
                    raise GptsmithError("the model gives no finite log-probabilities (NaN or infinite): it is damaged.")
                logprobs[request][place] = value
                greedy[request] &= is_best


def _tree(requests: Sequence[Continuation]) -> list[_Node]:
    """Return the roots of the tree of the sequences that predict the requests' tokens."""
    order = sorted(range(len(requests)), key=lambda i: requests[i].context + requests[i].ids[:-1])
    roots: list[_Node] = []
    path: list[_Node] = []  # from a root to the end of the sequence before
    previous: tuple[int, ...] = ()
    for i in order:
        request = requests[i]
        sequence = request.context + request.ids[:-1]
        shared = _num_common(previous, sequence)
        while path and path[-1].start >= shared:
            path.pop()
        if path and path[-1].start + len(path[-1].tokens) > shared:
            _split(path[-1], shared)
        if shared < len(sequence):
            parent = path[-1] if path else None
            node = _Node(sequence[shared:], shared, parent)
            (roots if parent is None else parent.children).append(node)
            path.append(node)
        first = len(request.context) - 1
        for node in reversed(path):
            for position in range(max(first, node.start), min(len(sequence), node.start + len(node.tokens))):
                node.wanted.setdefault(position, []).append((i, position - first))
            if node.start <= first:
                break
        previous = sequence
    return roots


def _split(node: _Node, position: int) -> None:
    """Cut a node at a position; the rest becomes its only child."""
    cut = position - node.start
    rest = _Node(node.tokens[cut:], position, node, node.children)
    for child in rest.children:
        child.parent = rest
    rest.wanted = {at: node.wanted.pop(at) for at in list(node.wanted) if at >= position}
    node.tokens, node.children = node.tokens[:cut], [rest]


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
