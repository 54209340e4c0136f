from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsae.demo.scoring import cross_entropy, sequences, unigram_cross_entropy


def test_cross_entropy_is_the_independent_model_s(
    demo_model: Path, packed: dict[str, Any], numpy_model: Any
) -> None:
    """Over five sequences in uneven batches, and a tail too short for one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model).eval()
    ids = packed["held_out.jsonl"][:5]
    packed_ids = np.append(ids.ravel(), [7, 7, 7])
    found = cross_entropy(model, packed_ids, 256, batch_sequences=2)
    assert found == pytest.approx(numpy_model.nats(ids).mean(), abs=1e-5)


def test_unigram_scores_all_but_each_sequence_s_first_token() -> None:
    """Worked by hand: counts 3, 1, 0 and one more each; targets 1, 0 and 2, 0."""
    nats = unigram_cross_entropy(np.array([0, 0, 1, 0]), np.array([2, 1, 0, 0, 2, 0]), 3, 3)
    p = np.array([4, 2, 1]) / 7
    assert nats == pytest.approx(-np.log(p[[1, 0, 2, 0]]).mean(), abs=1e-12)


def test_sequences_leave_out_the_incomplete_one() -> None:
    """Seven ids make two sequences of three."""
    assert sequences(np.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
