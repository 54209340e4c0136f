"""The command line is a promise: its options, its exit codes, its one-line errors."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import mlsae.analyze
from mlsae.cli import main
from mlsae.store import open_store

OPTIONS = {
    "harvest": "model dataset out revision init init-seed blocks tokenizer split subset "
    "shuffle-seed text-column tokens-column max-tokens max-disk context-length packing bos "
    "isolate-documents "
    "layers sites keep-positions keep-seed encoding max-encoding-fvu model-dtype "
    "attn-implementation batch-size shard-size device device-map allow-mixed-hardware dry-run "
    "config",
    "train": "cache cache-dir cache-size config out site layers expansion-factor num-latents k "
    "preset architecture l1 l1-warmup resample-every normalize layer-scale layer-weights layer-l1 "
    "matryoshka threshold target-l0 l0-penalty l0-warmup initial-threshold bandwidth "
    "straight-through "
    "batch-size micro-batch epochs max-rows lr schedule lr-decay warmup clip-grad-norm "
    "validation-fraction skip-positions loss-space window seed data-seed device precision "
    "distribute resume keep track checkpoint-seconds",
    "analyze": "cache cache-dir cache-size sae out rows max-tokens model batch-size "
    "examples samples context-tokens examples-seed decomposition-max-tokens prompt "
    "prompt-file figures device to-delphi config",
    "events": "cache cache-dir cache-size sae out rows max-tokens batch-size part-events "
    "device config",
    "latents": "analysis where sort limit columns out",
    "examples": "analysis latent layer limit",
    "export": "run out to model",
    "import": "source out site layers",
    "demo": "out",
    "store info": "location json",
    "store verify": "location",
    "store copy": "source target layers sites rows encoding max-encoding-fvu",
    "store rm": "directory yes",
}
"""Every option of every command; adding or renaming one is a decision to be seen here."""


def commands(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    """Full name → command, subgroups walked."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{prefix}{name} ")
        else:
            found[prefix + name] = command
    return found


def parameters(command: click.Command) -> list[click.Parameter]:
    """Arguments and options of a command, but for that of help."""
    # click keeps the help option that it has made once.
    found = command.get_params(click.Context(command, **main.context_settings))
    return [parameter for parameter in found if "--help" not in parameter.opts]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The real command in a real process."""
    command = [sys.executable, "-m", "mlsae", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_options_are_those_promised():
    """A snapshot of names."""
    found = {
        name: sorted(max(p.opts, key=len).removeprefix("--") for p in parameters(command))
        for name, command in commands(main).items()
    }
    assert found == {name: sorted(options.split()) for name, options in OPTIONS.items()}


def test_every_option_has_help():
    """`--help` explains each of them."""
    for name, command in commands(main).items():
        for parameter in parameters(command):
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.name}"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_fits_a_screen_and_is_whole(flag: str):
    """Every command's, by both names; the list of commands cuts no summary."""
    for name, command in {"": main, **commands(main)}.items():
        shown = CliRunner().invoke(main, [*name.split(), flag])
        assert shown.exit_code == 0, name
        assert max(map(len, shown.output.splitlines())) <= 80, name
        text = " ".join(shown.output.split())
        assert "..." not in text.removeprefix("Usage: main [OPTIONS] COMMAND [ARGS]..."), name
        summary = " ".join((command.help or "").split("\n\n")[0].split())
        assert summary in text, name
        if name and " " not in name:
            assert summary in " ".join(CliRunner().invoke(main, [flag]).output.split())


def test_help_and_docs_say_what_each_encoding_costs():
    """A line each."""
    from mlsae.store.format.presets import COSTS, PRESETS

    assert [*COSTS] == [*PRESETS]
    shown = CliRunner().invoke(main, ["harvest", "--help"]).output
    lines = [line.split() for line in shown.splitlines()]
    page = (Path(__file__).resolve().parents[2] / "docs/harvest.md").read_text()
    for name in PRESETS:
        (figures,) = [words[1:4] for words in lines if words[:1] == [name]]
        assert float(figures[0]) > 0
        assert f"| `{name}` | {' | '.join(figures)} | " in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--cache", "a"], "Missing option '--out'"),
        (
            ["train", "--cache", "a", "--out", "b", "-k", "few"],
            "expected a number of items such as",
        ),
        (["harvest", "--layers", "3-1"], "got the range '3-1'"),
        (["harvest", "--max-disk", "200GX"], "expected a number of bytes such as 200GB"),
        (["fly"], "No such command 'fly'"),
        (["activations", "--out", "a"], "No such command 'activations': its name is mlsae events"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message):
    """Usage errors name the option."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize("command", ["harvest", "analyze", "events"])
def test_every_long_command_reads_a_file_of_options(command: str, tmp_path: Path):
    """Names are those of the flags; the command line comes first."""
    path = tmp_path / f"{command}.yaml"
    content = {
        "harvest": "{model: m, attn-implementation: eager, dataset: [a:1, b:2], max-tokens: 1e3}",
        "analyze": "{cache: m, sae: s, figures: no, context-tokens: [8, 4], prompt: hello}",
        "events": "{cache: m, sae: s, max-tokens: 2k}",
    }[command]
    expected = {
        "harvest": {"attention_implementation": "eager", "dataset": ("a:1", "b:2")},
        "analyze": {"figures": False, "context_tokens": (8, 4), "prompts": ("hello",)},
        "events": {"cache": ("m",), "sae": Path("s"), "max_tokens": 2000},
    }[command]
    path.write_text(content)
    given = ["--config", str(path), "--out", "mine", "--batch-size", "3"]
    with main.commands[command].make_context(command, given) as context:
        found = context.params
    assert {name: found[name] for name in expected} == expected
    assert (found["out"], found["batch_size"]) == (Path("mine"), 3)


@pytest.mark.parametrize(
    ("content", "flag", "kept"),
    [
        ("device: cuda", "--device-map auto", {"device": "auto", "device_map": "auto"}),
        ("device-map: auto", "--device cpu", {"device": "cpu", "device_map": None}),
    ],
)
def test_options_of_a_file_give_way(content: str, flag: str, kept, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(f"{{model: m, dataset: d, out: o, {content}}}")
    given = ["--config", str(tmp_path / "mine.yaml"), *flag.split()]
    with main.commands["harvest"].make_context("harvest", given) as context:
        assert {name: context.params[name] for name in kept} == kept


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_consoles_that_lack_letters_have_them_escaped(encoding: str, sample):
    """Help, lists and errors; no traceback."""
    runner = CliRunner(charset=encoding)
    for words in (["harvest", "--help"], ["store", "info", sample.path], ["train", "-k", "你"]):
        done = runner.invoke(main, [str(word) for word in words])
        assert done.exit_code == (2 if "train" in words else 0), done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)


def test_reader_of_a_list_may_leave(sample, tmp_path: Path):
    """As head does: no message."""
    words = shlex.join([sys.executable, "-m", "mlsae", "store", "info", str(sample.path)])
    command = f"{words} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""


def test_errors_are_one_line_without_a_traceback(sample, tmp_path: Path):
    """Exit status 1, one line on stderr, nothing made."""
    (tmp_path / "not-a-store").mkdir()
    (sample.path / "complete.json").unlink()
    for arguments, message in [
        (["store", "info", "absent"], "Error: absent does not exist; expected an activation store"),
        (
            ["store", "verify", "not-a-store"],
            "Error: not-a-store is not an activation store: it has",
        ),
        (
            ["store", "copy", str(sample.path), "copy"],
            "is incomplete: 5 of 5 shards are committed; run the",
        ),
    ]:
        before = sorted(tmp_path.rglob("*"))
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\n" + "Tried " * 99),
            "CUDA out of memory. Tri",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9"), "[enforce "),
        (MemoryError(), "of this machine): give a smaller --batch-size, or free some memory"),
        (MemoryError("Unable to allocate 8. GiB for an array"), "Unable to allocate 8. GiB for an"),
    ],
)
def test_full_memory_is_one_line_wherever_it_is_met(
    error: Exception, cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(_: object):
        raise error

    monkeypatch.setattr(mlsae.analyze, "run", full)
    arguments = ["--cache", tmp_path, "--sae", tmp_path, "--out", tmp_path / "out"]
    done = CliRunner().invoke(main, ["analyze", *map(str, arguments)])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: out of memory ({cause}")
    assert len(done.stderr.splitlines()) == 1
    assert len(done.stderr) < 200
    monkeypatch.setattr(mlsae.analyze, "run", lambda _: {}["defect"])
    assert isinstance(
        CliRunner().invoke(main, ["analyze", *map(str, arguments)]).exception, KeyError
    )


def test_store_info_and_verify_speak_to_people_and_programs(sample, tmp_path: Path):
    """A screen, a JSON object, a verdict; damage exits with 1 and names rule and object."""
    import json

    shown = run("store", "info", str(sample.path), cwd=tmp_path)
    assert "layers 0–1, 3; d_model 20; float16" in shown.stdout
    parsed = json.loads(run("store", "info", str(sample.path), "--json", cwd=tmp_path).stdout)
    assert parsed["complete"] is True
    assert parsed["num_committed"] == parsed["num_shards"] == 5
    assert parsed["store_id"] in shown.stdout
    sound = run("store", "verify", str(sample.path), cwd=tmp_path)
    assert (sound.returncode, sound.stdout) == (
        0,
        f"{sample.path} is sound: store_id {parsed['store_id']}\n",
    )
    shard = sample.path / "activations/resid_post/1/c.2.0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    damaged = run("store", "verify", str(sample.path), cwd=tmp_path)
    assert damaged.returncode == 1
    index, whole = damaged.stdout.splitlines()
    assert index.startswith("R-SHARD-3 activations/resid_post/1: ")
    assert whole.startswith("R-COMMIT-4 activations/resid_post/1/c.2.0: the SHA-256 is not")
    assert "breaks 2 rules of storage_schema.md" in damaged.stderr


def test_a_store_elsewhere_is_looked_at_as_it_is_there(
    sample, serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By URL, past what is kept of it on this machine, which says nothing of damage there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    url = serve("web", sample.path)
    shown = CliRunner().invoke(main, ["store", "info", url])
    assert shown.exit_code == 0
    assert shown.output.startswith(f"{url}: complete, schema 1.0")
    sound = CliRunner().invoke(main, ["store", "verify", url])
    assert (sound.exit_code, sound.stdout.splitlines()[-1][: len(url) + 9]) == (
        0,
        f"{url} is sound",
    )
    assert not (tmp_path / "home").exists()
    kept = open_store(url)
    shard = sample.path / "activations/resid_post/1/c.2.0"
    before = kept.read("resid_post", 1)
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    np.testing.assert_array_equal(kept.read("resid_post", 1), before)
    damaged = CliRunner().invoke(main, ["store", "verify", url])
    assert damaged.exit_code == 1
    assert "R-SHARD-3 activations/resid_post/1" in damaged.output


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "5000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(
    given: dict[str, str], expected: dict[str, str], sample
):
    """Set before torch is loaded, or it would have no effect."""
    script = (
        "import os, sys; from mlsae.cli import main\n"
        "assert 'torch' not in sys.modules\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print({k: v for k, v in os.environ.items() if 'OMP_SPIN' in k or 'OMP_WAIT' in k})\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    done = subprocess.run(
        [sys.executable, "-c", script, "store", "info", str(sample.path)],
        env={**clean, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == str(expected)


def test_the_backend_that_a_notebook_names_is_not_taken(sample, monkeypatch: pytest.MonkeyPatch):
    """Every process is given one, and without its module matplotlib cannot be imported."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    done = CliRunner().invoke(main, ["store", "info", str(sample.path)])
    assert done.exit_code == 0
    assert os.environ["MPLBACKEND"] == "agg"


def test_help_is_quick_because_it_loads_nothing_heavy(tmp_path: Path):
    """The libraries of the stages are imported inside the commands."""
    script = (
        "import sys; from mlsae.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'zarr', 'matplotlib', 'datasets', 'numpy'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
