"""The examples of latents against sorting all values, in exact arithmetic.

Activations and weights are small whole numbers, and biases tell the latents of a row apart: values
are exact whatever the shape of a product, and many are equal.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch

import mlsae.analyze.examples.collect as collecting
from mlsae.analyze.events.plan import plan_events
from mlsae.analyze.examples.collect import Examples, ExamplesPlan, random_scores
from mlsae.analyze.examples.table import write_examples
from mlsae.analyze.examples.windows import read_text
from mlsae.analyze.measure.rows.joint import Joint
from mlsae.analyze.measure.rows.walk import walk
from mlsae.analyze.pairing import Pairing, pair
from mlsae.analyze.results.tables import schema
from mlsae.base.errors import InputError
from mlsae.sae import SAE, ReLU, SAEConfig, TopK
from mlsae.store import MASKED, PADDING, SPECIAL, create, open_store

LAYERS = (2, 5, 6)
LENGTH, NUM_SEQUENCES, WIDTH, NUM_LATENTS = 9, 14, 8, 20
PLAN = ExamplesPlan(top=5, samples=2, before=3, after=2, seed=11)
KINDS = {
    "topk": SAEConfig(
        d_in=WIDTH,
        num_latents=NUM_LATENTS,
        architecture=TopK(4),
        normalize="none",
        encoder_bias=True,
    ),
    "relu": SAEConfig(
        d_in=WIDTH,
        num_latents=NUM_LATENTS,
        architecture=ReLU(),
        normalize="none",
        encoder_bias=True,
    ),
}
Record = Callable[[Any], dict[str, Any]]


def write(path: Path, seed: int, **more: Any) -> Path:
    """A store of whole numbers, with documents that begin and end anywhere."""
    generator = np.random.default_rng(seed)
    num_tokens = NUM_SEQUENCES * LENGTH
    flags = generator.choice([0, SPECIAL, MASKED], num_tokens, p=[0.9, 0.05, 0.05])
    flags[-4:] = PADDING
    flags[3 * LENGTH + 5 : 4 * LENGTH] = PADDING
    with create(
        path,
        tokens=generator.integers(0, 50, num_tokens),
        context_length=LENGTH,
        layers=LAYERS,
        d_model=WIDTH,
        documents=np.cumsum(generator.random(num_tokens) < 0.15),
        token_flags=flags.astype(np.uint8),
        batch_sequences=2,
        shard_bytes=2000,
        source={},
        **more,
    ) as writer:
        rows = np.arange(0, NUM_SEQUENCES, 2)
        for _ in rows:
            count = 2 * more.get("keep_positions", LENGTH)
            writer.append(
                {
                    ("resid_post", layer): generator.integers(-3, 4, (count, WIDTH)).astype(
                        np.float32
                    )
                    for layer in LAYERS
                }
            )
    return path


@pytest.fixture(scope="module")
def make_pairing(
    tmp_path_factory: pytest.TempPathFactory, training_record: Record
) -> Callable[..., Pairing]:
    """Some stores, each of other text, and an SAE of whole numbers; one of its latents is dead."""

    def make(kind: str, *, num_stores: int = 1, **more: Any) -> Pairing:
        root = tmp_path_factory.mktemp("whole")
        paths = [write(root / f"acts-{n}", n, **more) for n in range(num_stores)]
        sae = SAE(KINDS[kind])
        generator = np.random.default_rng(5)
        assert sae.b_enc is not None
        with torch.no_grad():
            w = generator.integers(-2, 3, (NUM_LATENTS, WIDTH))
            sae.W_enc.copy_(torch.from_numpy(w))
            sae.b_enc.copy_(torch.arange(NUM_LATENTS) / 64 - 4)
            sae.b_enc[7] = -1000
        sae.save(root / "sae", training_record(open_store(paths[0])))
        return pair(paths, root / "sae", torch.device("cpu"))

    return make


@dataclass(frozen=True)
class Truth:
    """Everything there is to know, in float64."""

    pairing: Pairing
    z: npt.NDArray[np.float64]
    """(layers, tokens, latents), 0 at tokens that are no eligible rows."""
    eligible: npt.NDArray[np.bool_]
    """By token."""
    row_of: dict[int, int]
    """Token → row."""

    @classmethod
    def of(cls, pairing: Pairing, sequences: npt.NDArray[np.int64]) -> "Truth":
        store, sae = pairing.store, pairing.sae
        tokens = store.row_tokens()
        chosen = store.eligible(1) & np.isin(tokens // LENGTH, sequences)
        z = np.zeros((len(LAYERS), store.num_tokens, NUM_LATENTS))
        weights, bias = (
            of.detach().double().numpy() for of in (sae.W_enc, sae.b_enc) if of is not None
        )
        for n, layer in enumerate(LAYERS):
            pre = store.read("resid_post", layer)[chosen].astype(np.float64) @ weights.T + bias
            if (k := sae.architecture.most_active) is not None:
                pre[pre < np.sort(pre, axis=1)[:, -k, None]] = 0
            z[n, tokens[chosen]] = np.maximum(pre, 0)
        eligible = np.zeros(store.num_tokens, bool)
        eligible[tokens[chosen]] = True
        return cls(pairing, z, eligible, {int(t): n for n, t in enumerate(tokens)})

    def events(self, latent: int) -> list[tuple[float, int, int]]:
        """(value, token, index of the layer), the largest first, the first of equal ones first."""
        found = [
            (float(self.z[n, t, latent]), t, n)
            for n in range(len(LAYERS))
            for t in range(self.z.shape[1])
            if self.z[n, t, latent] > 0
        ]
        return sorted(found, key=lambda of: (-of[0], of[1], of[2]))

    def rows(self, plan: ExamplesPlan) -> Iterator[dict[str, Any]]:
        """The table, by its definition."""
        for latent in range(NUM_LATENTS):
            events = self.events(latent)
            if not events:
                continue
            of_token: dict[int, tuple[float, int, int]] = {}
            for event in events:
                of_token.setdefault(event[1], event)
            for rank, event in enumerate(list(of_token.values())[: plan.top]):
                yield self._row(plan, latent, event, kind="top", rank=rank)
            for n in range(len(LAYERS)):
                of_layer = [event for event in events if event[2] == n]
                for rank, event in enumerate(of_layer[: plan.top]):
                    yield self._row(plan, latent, event, kind="top_layer", rank=rank)
            for q in range(4):
                low, high = events[0][0] * q / 4, events[0][0] * (q + 1) / 4
                of_range = [event for event in events if low < event[0] <= high]
                of_range.sort(key=lambda of: -score(of[1] * len(LAYERS) + of[2], latent, plan.seed))
                drawn = sorted(of_range[: plan.samples], key=lambda of: (-of[0], of[1], of[2]))
                for rank, event in enumerate(drawn):
                    yield self._row(plan, latent, event, kind="sample", rank=rank) | {
                        "quantile": q,
                        "low": low,
                        "high": high,
                    }

    def _row(
        self, plan: ExamplesPlan, latent: int, event: tuple[float, int, int], **more: Any
    ) -> dict[str, Any]:
        value, token, n = event
        store = self.pairing.store
        ids, documents, flags = store.tokens(), store.documents(), store.token_flags()

        def together(a: int) -> bool:
            return (
                a // LENGTH == token // LENGTH
                and documents[a] == documents[token]
                and flags[a] != PADDING
            )

        first = last = token
        while first > 0 and token - first < plan.before and together(first - 1):
            first -= 1
        while last + 1 < len(ids) and last - token < plan.after and together(last + 1):
            last += 1
        window = range(first, last + 1)
        return {
            "latent": latent,
            "layer": LAYERS[n],
            "quantile": None,
            "low": None,
            "high": None,
            "row": self.row_of[token],
            "token": token,
            "token_ids": [int(ids[t]) for t in window],
            "peak": token - first,
            "pieces": None,
            "values": [self.z[n, t, latent] if self.eligible[t] else None for t in window],
            "layer_values": self.z[:, token, latent].tolist(),
            "value": value,
            **more,
        }


def score(event: int, latent: int, seed: int) -> int:
    """SplitMix64 with arithmetic shifts, in whole numbers of any size."""

    def wrapped(x: int) -> int:
        return (x + 2**63) % 2**64 - 2**63

    x = wrapped(event * 0x9E3779B97F4A7C15)
    x = wrapped(x ^ wrapped((latent + seed * 0x632BE5AB) * 0xD1B54A32D192ED03))
    x = wrapped((x ^ x >> 30) * 0xBF58476D1CE4E5B9)
    x = wrapped((x ^ x >> 27) * 0x94D049BB133111EB)
    return max(1, (x ^ x >> 31) >> 32 & 0x7FFFFFFF)


def collect(
    pairing: Pairing,
    sequences: npt.NDArray[np.int64],
    path: Path,
    *,
    plan: ExamplesPlan = PLAN,
    batch_rows: int = 4096,
) -> list[dict[str, Any]]:
    """The table of a store, through the file."""
    examples = Examples(pairing, plan)
    events = path.with_suffix(".events")
    events.mkdir(exist_ok=True)
    walk(
        pairing,
        sequences,
        batch_rows=batch_rows,
        events=plan_events(pairing, sequences[:3], 100, {}),
        directory=events,
        joint=Joint(pairing, 0),
        examples=examples,
        progress=lambda _: None,
    )
    told: list[int] = []
    num_rows = write_examples(path, schema("examples", {}), examples, None, told.append)
    assert sum(told) == NUM_LATENTS
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    assert len(rows) == num_rows
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch_rows", "events"),
    [(1, 1), (5, 30), (4096, 2**20)],
    ids=["one by one", "odd", "all at once"],
)
def test_the_table_is_what_sorting_all_values_gives(
    kind: str,
    batch_rows: int,
    events: int,
    make_pairing: Callable[..., Pairing],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is read, encoded and gathered at once; windows end with documents, sequences and
    text; a latent that is never active has no rows."""
    monkeypatch.setattr(collecting, "_EVENTS", events)
    monkeypatch.setattr(collecting, "_AT_ONCE", 10 if events < 100 else 2**16)
    pairing = make_pairing(kind)
    sequences = np.array([0, 1, 3, 4, 5, 8, 9, 10, 13])
    truth = Truth.of(pairing, sequences)
    expected = list(truth.rows(PLAN))
    found = collect(pairing, sequences, tmp_path / "t.parquet", batch_rows=batch_rows)
    assert found == expected
    _see_that_it_has_every_case(expected)


def _see_that_it_has_every_case(rows: list[dict[str, Any]]) -> None:
    """The text above is worth nothing if the data lack what it speaks of."""
    assert not any(row["latent"] == 7 for row in rows)
    tops = [row for row in rows if row["kind"] == "top"]
    assert any(
        (a["latent"], a["value"]) == (b["latent"], b["value"]) and a["token"] < b["token"]
        for a, b in itertools.pairwise(tops)
    )
    tokens = [(row["latent"], row["token"]) for row in tops]
    assert len(set(tokens)) == len(tokens)
    assert any(sum(value > 0 for value in row["layer_values"]) > 1 for row in tops)
    assert any(None in row["values"] for row in rows)
    positions = {row["token"] % LENGTH for row in rows}
    assert {1, LENGTH - 1} <= positions
    cut = [row for row in rows if len(row["token_ids"]) < 6]
    assert any(2 < row["token"] % LENGTH < LENGTH - 2 for row in cut)
    assert any(row["peak"] == 0 for row in rows)
    assert any(row["peak"] == len(row["token_ids"]) - 1 for row in rows)
    assert {row["quantile"] for row in rows} == {None, 0, 1, 2, 3}


@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_a_store_does_not_keep_have_no_value(
    kind: str, make_pairing: Callable[..., Pairing], tmp_path: Path
) -> None:
    pairing = make_pairing(kind, keep_positions=5, keep_seed=2)
    sequences = np.arange(NUM_SEQUENCES)
    truth = Truth.of(pairing, sequences)
    expected = list(truth.rows(PLAN))
    found = collect(pairing, sequences, tmp_path / "t.parquet", batch_rows=5)
    assert found == expected
    assert any(row["row"] != row["token"] for row in found)
    assert any(
        row["values"].count(None) > 2 and sum(v is not None for v in row["values"]) > 1
        for row in found
    )


def test_several_stores_are_counted_through(
    make_pairing: Callable[..., Pairing], tmp_path: Path
) -> None:
    pairing = make_pairing("topk", num_stores=2)
    sequences = np.arange(2 * NUM_SEQUENCES)
    truth = Truth.of(pairing, sequences)
    found = collect(pairing, sequences, tmp_path / "t.parquet", batch_rows=11)
    assert found == list(truth.rows(PLAN))
    assert {row["token"] // (NUM_SEQUENCES * LENGTH) for row in found} == {0, 1}


@pytest.mark.parametrize(
    "changes",
    [{"top": 1, "samples": 0}, {"before": 0, "after": 0}, {"top": 200, "samples": 100}],
    ids=["one", "no context", "all there are"],
)
def test_any_number_of_examples_and_any_window(
    changes: dict[str, int], make_pairing: Callable[..., Pairing], tmp_path: Path
) -> None:
    plan = replace(PLAN, **changes)
    pairing = make_pairing("relu")
    sequences = np.arange(NUM_SEQUENCES)
    truth = Truth.of(pairing, sequences)
    found = collect(pairing, sequences, tmp_path / "t.parquet", plan=plan)
    assert found == list(truth.rows(plan))


def test_another_seed_draws_others(make_pairing: Callable[..., Pairing], tmp_path: Path) -> None:
    pairing = make_pairing("topk")
    sequences = np.arange(NUM_SEQUENCES)
    found = [
        collect(pairing, sequences, tmp_path / "t.parquet", plan=plan)
        for plan in (PLAN, replace(PLAN, seed=-12), PLAN)
    ]
    assert found[0] == found[2]
    assert _of(found[0], "top", "top_layer") == _of(found[1], "top", "top_layer")
    assert _of(found[0], "sample") != _of(found[1], "sample")


def _of(rows: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] in kinds]


def test_every_event_is_drawn_as_often_as_any_other() -> None:
    """The largest of 50 scores, over 20,000 latents: χ² below its 99.9th percentile."""
    events, latents = torch.meshgrid(torch.arange(50), torch.arange(20_000), indexing="ij")
    for seed in (0, 1, 2**40):
        scores = random_scores(events, latents, seed)
        assert int(scores.min()) >= 1
        drawn = torch.bincount(scores.argmax(dim=0), minlength=50).double()
        assert float(((drawn - 400) ** 2 / 400).sum()) < 85.4


def test_token_ids_that_a_table_cannot_hold_are_refused(tmp_path: Path) -> None:
    """Stores hold ids to 2³² − 1, tables of examples to 2³¹ − 1."""
    tokens = np.arange(16, dtype=np.uint32)
    for largest, is_fine in ((2**31 - 1, True), (2**31, False)):
        tokens[5] = largest
        path = tmp_path / str(largest)
        with create(
            path,
            tokens=tokens,
            context_length=8,
            layers=(0,),
            d_model=2,
            source={"made_by": "test"},
        ) as writer:
            writer.append({("resid_post", 0): np.ones((16, 2), np.float32)})
        arguments = (open_store(path), np.array([0]), np.ones(8, bool), torch.device("cpu"))
        if is_fine:
            assert read_text(*arguments).ids[5] == largest
            continue
        message = r"token 2,147,483,648 of .* is over 2,147,483,647, the largest that the table of"
        with pytest.raises(InputError, match=message):
            read_text(*arguments)
