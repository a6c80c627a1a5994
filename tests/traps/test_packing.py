"""Public reports about packing, replayed. Each docstring names the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gptsmith.data.conversations import Counts, Example
from gptsmith.data.packing import Examples, PackedLoader, pack, packed_batch
from gptsmith.errors import UsageError
from gptsmith.model.families import FAMILIES
from gptsmith.train.chats import Chats
from tests.factories import WITH_EXPERTS, tiny_model


def examples_of(lengths: list[int]) -> Examples:
    random = np.random.default_rng(0)
    return Examples(Example(random.integers(1, 30, n).tolist(), [False, *[True] * (n - 1)]) for n in lengths)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITH_EXPERTS])
def test_C1_documents_of_a_row_do_not_see_each_other(family: str) -> None:
    """TRL #805, LLaMA-Factory #2289, nanoVLM #204: positions start anew in each document, but attention still reaches
    the documents before (the logits of a prefix change by 0.462 with the text before it)."""
    options: dict[str, Any] = {"intermediate_size": None} if family == "gpt1" else {}
    model = tiny_model(family, **options)
    first, second, third = examples_of([9, 8, 7])
    changed = Example([id % 29 + 1 for id in first.ids], first.trained)
    with torch.no_grad():
        one, two = (
            model(batch.ids, document_ids=batch.document_ids)[0]
            for batch in (packed_batch(Examples([d, second, third]), [[0, 1, 2]], 24) for d in (first, changed))
        )
    assert not torch.equal(one[:8], two[:8])
    assert torch.equal(one[8:21], two[8:21])


def test_C2_long_conversations_do_not_fill_the_buffer() -> None:
    """nanochat #590: conversations longer than a row stay in the buffer of best-fit packing, until it holds nothing
    else and every batch is padding (40.4% of the rows at a length of 512)."""
    lengths = [20, 90] * 8 + [30] * 8
    with pytest.raises(UsageError, match="an example of 90 tokens does not fit into a row of 64"):
        pack(lengths, 64)
    chats = Chats(examples_of(lengths), Examples([]), Counts()).within(64, on_long="skip")
    assert sorted(chats.train.lengths.tolist()) == [20] * 8 + [30] * 8
    loader = PackedLoader(chats.train, batch_size=2, seq_len=64, seed=0)
    batches = [next(loader) for _ in range(5 * len(loader.rows))]  # ten epochs
    assert all(batch.num_targets for batch in batches)
    assert sum(batch.num_targets for batch in batches) == 10 * chats.train.num_trained


def test_C3_an_end_token_between_documents_is_no_signal_that_is_relied_on() -> None:
    """TRL #805 ("the end token is enough of a signal"): documents are told apart without any token between them."""
    batch = packed_batch(examples_of([4, 4, 3]), [[0, 1, 2]], 10)
    assert batch.document_ids is not None
    assert batch.document_ids[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, -1, -1]
