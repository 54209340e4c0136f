"""Ranks are read from the launcher's environment and share shards without talking."""

import pytest

from mlsae.base.errors import InputError
from mlsae.base.ranks import Ranks, environment_number


def test_one_process_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Ranks.from_environment() == Ranks(0, 1)


def test_environment_of_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    ranks = Ranks.from_environment()
    assert ranks == Ranks(2, 3)
    ranks.say("only rank 0 says this")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("rank", "size"), [("3", "3"), ("-1", "2"), ("a", "2"), ("0", "0")])
def test_impossible_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str, size: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(InputError, match=f"got RANK={rank} WORLD_SIZE={size}"):
        Ranks.from_environment()


def test_a_world_without_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of four would wait for three that nobody started."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"WORLD_SIZE=4 is set, as where several .* but RANK is"):
        Ranks.from_environment()


def test_a_number_of_a_launcher_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert environment_number("LOCAL_RANK", 3) == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment_number("LOCAL_RANK", 3) == 1
    monkeypatch.setenv("LOCAL_RANK", "")
    with pytest.raises(InputError, match="LOCAL_RANK must be a number, as launchers set it, got"):
        environment_number("LOCAL_RANK", 3)


@pytest.mark.parametrize(
    ("rank", "local_rank", "quiet", "told"),
    [(1, "1", 0.0, 1), (2, "2", 0.0, 0), (2, None, 0.0, 1), (1, "1", 9.0, 0)],
)
def test_a_long_wait_for_the_first_is_one_line_a_launcher(
    rank: int,
    local_rank: str | None,
    quiet: float,
    told: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rank 1 speaks; one that no launcher started for itself; short waits go unsaid."""
    monkeypatch.setattr("mlsae.base.ranks.QUIET_SECONDS", quiet)
    monkeypatch.setattr("mlsae.base.ranks.POLL_SECONDS", 0.0)
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    answers = iter([False, False, True])
    Ranks(rank, 3).await_first(lambda: next(answers), "to begin out")
    line = (
        f"rank {rank} waits for rank 0 to begin out; if no other process runs this command, "
        "unset RANK and WORLD_SIZE\n"
    )
    assert capsys.readouterr().out == told * line


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_shard_has_one_owner(world_size: int) -> None:
    pending = [0, 1, 4, 5, 6, 9]
    shares = [Ranks(rank, world_size).own(pending) for rank in range(world_size)]
    assert sorted(shard for share in shares for shard in share) == pending
