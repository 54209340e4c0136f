"""Stores that keep some positions of every sequence: which, and what readers make of it."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import zarr

from mlsae.base.errors import InputError
from mlsae.base.files import read_sealed, seal
from mlsae.store import PADDING, SPECIAL, InvalidStoreError, create, open_store
from mlsae.store.format.layout import array_bytes, plan_layout
from mlsae.store.format.positions import kept_positions
from mlsae.store.tools.verify import verify

LENGTH, NUM_SEQUENCES, KEPT = 24, 31, 5
FIXED = [[16, 59, 87, 94], [28, 43, 46, 56]]


def draw_one_by_one(seed: int, sequence: int, length: int, num: int) -> list[int]:
    """R-ROW-3 of the specification in plain integers."""
    num_draws = num if 2 * num <= length else length - num
    key = int.from_bytes(hashlib.sha256(f"mlsae positions {seed}".encode()).digest(), "little")
    stream = np.random.PCG64(key).random_raw((sequence + 1) * num_draws).tolist()
    taken: set[int] = set()
    for j in range(num_draws):
        last = length - num_draws + j
        chosen = (stream[sequence * num_draws + j] >> 32) * (last + 1) >> 32
        taken.add(last if chosen in taken else chosen)
    return sorted(taken if 2 * num <= length else set(range(length)) - taken)


@pytest.mark.parametrize(("length", "num"), [(24, 1), (24, 12), (24, 13), (24, 24), (7, 3), (1, 1)])
def test_kept_positions_are_those_of_the_specification(length, num):
    """For whatever block of sequences is asked for."""
    expected = [draw_one_by_one(3, q, length, num) for q in range(20)]
    assert kept_positions(3, 0, 20, length, num).tolist() == expected
    assert kept_positions(3, 13, 4, length, num).tolist() == expected[13:17]


def test_kept_positions_are_fixed_for_good_and_depend_on_the_seed():
    """A change would orphan every store made before."""
    assert kept_positions(0, 0, 2, 100, 4).tolist() == FIXED
    assert kept_positions(1, 0, 2, 100, 4).tolist() != FIXED


@pytest.mark.parametrize("num", [3, 9])
def test_every_position_and_every_pair_is_kept_equally_often(num):
    """Uniform, without replacement, independent of the block: chi-square within four deviations."""
    length, trials = 12, 400_000
    positions = kept_positions(0, 0, trials, length, num)
    assert (np.diff(positions, axis=1) > 0).all()
    table = np.zeros((trials, length))
    np.put_along_axis(table, positions, 1.0, axis=1)
    pairs = table.T @ table
    once = trials * num / length
    assert (np.abs(np.diag(pairs) - once) < 4.5 * np.sqrt(once * (1 - num / length))).all()
    share = num * (num - 1) / (length * (length - 1))
    both = pairs[np.triu_indices(length, 1)]
    assert (np.abs(both - trials * share) < 4.5 * np.sqrt(trials * share * (1 - share))).all()
    # Neighbouring sequences know nothing of each other.
    again = (table[:-1] * table[1:]).sum() / (trials - 1)
    assert abs(again - num**2 / length) < 0.01


def make(path: Path, **options) -> tuple[Path, np.ndarray, np.ndarray]:
    """A store of kept positions in which every value says whose it is; its flags and row tokens."""
    num_tokens = LENGTH * NUM_SEQUENCES
    flags = np.zeros(num_tokens, np.uint8)
    flags[::7], flags[5::31] = SPECIAL, PADDING
    settings = {"keep_positions": KEPT, "keep_seed": 2, "batch_sequences": 3, "shard_bytes": 1000}
    with create(
        path,
        tokens=np.arange(num_tokens),
        token_flags=flags,
        context_length=LENGTH,
        layers=(0, 2),
        d_model=4,
        encoding="float32",
        **{**settings, **options},
    ) as writer:
        while (start := writer.position) is not None:
            stop = writer.shard_range(start // writer.shard_rows).stop
            rows = writer.row_tokens(start, stop)[:, None] + np.arange(4) * 0.25
            writer.append({("resid_post", 0): rows, ("resid_post", 2): -rows})
    kept = kept_positions(2, 0, NUM_SEQUENCES, LENGTH, KEPT)
    return path, flags, (kept + LENGTH * np.arange(NUM_SEQUENCES)[:, None]).reshape(-1)


def test_rows_know_their_tokens_positions_and_flags(tmp_path: Path):
    """By any range of rows; tokens are still read by token."""
    path, flags, tokens = make(tmp_path / "acts")
    store = open_store(path)
    assert (store.rows_per_sequence, store.num_rows) == (KEPT, KEPT * NUM_SEQUENCES)
    assert store.num_tokens == LENGTH * NUM_SEQUENCES == len(store.tokens())
    assert store.num_rows > 2 * store.shard_rows
    for span in ((0, store.num_rows), (17, 90), (3, 4), (40, 40)):
        rows = slice(*span)
        assert np.array_equal(store.row_tokens(*span), tokens[rows])
        assert np.array_equal(store.row_flags(*span), flags[tokens[rows]])
        assert np.array_equal(store.positions(*span), tokens[rows] % LENGTH)
        eligible = (flags[tokens[rows]] == 0) & (tokens[rows] % LENGTH >= 2)
        assert np.array_equal(store.eligible(2, *span), eligible)
        assert np.array_equal(store.read("resid_post", 2, *span)[:, 0], -tokens[rows])
    assert np.array_equal(zarr.open_array(path / "row_token", mode="r")[:], tokens)
    assert verify(path).problems == []


def test_moments_follow_the_rows_flags_and_positions(tmp_path: Path):
    """A filter by position means the position of the row's token."""
    path, flags, tokens = make(tmp_path / "acts")
    moments = open_store(path).moments(skip_positions=3)
    chosen = tokens[(flags[tokens] == 0) & (tokens % LENGTH >= 3)]
    assert moments.count == len(chosen)
    np.testing.assert_allclose(moments.mean[0, 0], chosen.mean(), rtol=1e-6)
    np.testing.assert_allclose(moments.m2[0, 0], ((chosen - chosen.mean()) ** 2).sum(), rtol=1e-6)


def test_the_choice_belongs_to_the_plan(tmp_path: Path):
    """Another number or seed is another plan; all positions have no row_token."""
    ids = {open_store(make(tmp_path / str(seed), keep_seed=seed)[0]).plan_id for seed in (0, 1)}
    whole = open_store(make(tmp_path / "all", keep_positions=None)[0])
    assert len(ids | {whole.plan_id}) == 3
    assert not (tmp_path / "all/row_token").exists()
    assert np.array_equal(whole.row_tokens(5, 9), [5, 6, 7, 8])


def test_rows_that_are_not_the_plans_choice_are_found(tmp_path: Path):
    """Even where every hash around them is right."""
    path, _, _ = make(tmp_path / "acts")
    plan = read_sealed(path / "plan.json")
    other = make(tmp_path / "other", keep_seed=9)[0] / "row_token/c.0"
    (path / "row_token/c.0").write_bytes(other.read_bytes())
    setup = read_sealed(path / "commits/setup.json")
    setup["objects"]["row_token/c.0"] = hashlib.sha256(other.read_bytes()).hexdigest()
    (path / "commits/setup.json").write_bytes(seal(setup))
    rules = {(p.rule, p.path) for p in verify(path).problems}
    assert ("R-ROW-3", "row_token") in rules
    assert plan["keep_positions"] == {"num": KEPT, "seed": 2}


def test_rows_of_tokens_that_are_not_there_are_refused(tmp_path: Path):
    """Even where every hash around them is right."""
    path, _, _ = make(tmp_path / "acts")
    zarr.open_array(path / "row_token", mode="r+")[-1] = LENGTH * NUM_SEQUENCES
    setup = read_sealed(path / "commits/setup.json")
    changed = (path / "row_token/c.0").read_bytes()
    setup["objects"]["row_token/c.0"] = hashlib.sha256(changed).hexdigest()
    (path / "commits/setup.json").write_bytes(seal(setup))
    store = open_store(path)
    for read in (store.row_tokens, store.row_flags, store.positions, store.eligible):
        with pytest.raises(InvalidStoreError, match="name tokens that the store does not have"):
            read()
    assert "R-ROW-3" in {problem.rule for problem in verify(path).problems}


@pytest.mark.parametrize("num", [0, LENGTH + 1, -1])
def test_an_impossible_number_of_positions_is_refused(tmp_path: Path, num: int):
    """Before anything is written, naming the range."""
    message = f"keep_positions must be 1 to the context length 24, got {num}"
    with pytest.raises(InputError, match=message):
        make(tmp_path / "acts", keep_positions=num)
    assert not (tmp_path / "acts").exists()


def test_bytes_of_kept_rows_are_foretold(tmp_path: Path):
    """Rows, shards and bytes before a run are those on disk."""
    path, _, _ = make(tmp_path / "acts")
    layout = plan_layout(
        num_tokens=LENGTH * NUM_SEQUENCES,
        context_length=LENGTH,
        layers=(0, 2),
        sites=["resid_post"],
        d_model=4,
        encoding="float32",
        batch_sequences=3,
        shard_bytes=1000,
        keep_positions=KEPT,
    )
    store = open_store(path)
    assert (layout.num_rows, layout.shard_rows) == (store.num_rows, store.shard_rows)
    shards = list((path / "activations").rglob("c.*"))
    sizes = array_bytes(layout.num_rows, 4 * 4, layout.chunk_rows, layout.shard_rows)
    assert 2 * sizes == sum(file.stat().st_size for file in shards)


def test_tokens_may_be_memory_maps_of_any_integer_type(tmp_path: Path):
    """Written block by block, as the array itself would be."""
    tokens = np.arange(LENGTH * NUM_SEQUENCES)
    ids = set()
    for dtype in ("<u2", "<i8", "<u4"):
        tokens.astype(dtype).tofile(tmp_path / dtype)
        mapped = np.memmap(tmp_path / dtype, dtype, "r")
        writer = create(
            tmp_path / f"acts{dtype}", tokens=mapped, context_length=LENGTH, layers=(0,), d_model=4
        )
        ids.add(writer.plan_id)
        assert np.array_equal(open_store(writer.path, incomplete=True).tokens(), tokens)
    assert len(ids) == 1
