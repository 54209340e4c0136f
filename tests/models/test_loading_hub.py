"""Models of the hub, from a real server on the loopback, in a process with a cache of its own.

Two processes do all the asking: one that reaches the hub, then one that does not.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mlsae.models import load
from mlsae.models.source.place import is_reachable

ASK = """
import json, sys, time
from mlsae.base.errors import InputError
from mlsae.models import load, load_tokenizer, outline
for what, name, revision in json.loads(sys.argv[1]):
    started = time.monotonic()
    try:
        found = {"load": load, "outline": outline, "tokenizer": load_tokenizer}[what](
            name, revision=revision
        )
        answer = {"fingerprint": found.fingerprint(), **found.place()}
    except InputError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer | {"seconds": time.monotonic() - started}), flush=True)
"""


def hub_module() -> Any:
    path = Path(__file__).resolve().parents[1] / "hub.py"
    spec = importlib.util.spec_from_file_location("loopback_hub", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(processes: Any, *asked: tuple[str, str, str | None]) -> list[dict[str, Any]]:
    process = processes.start(ASK, json.dumps(asked))
    assert process.wait() == 0, process.errors
    return [json.loads(line) for line in process.output.splitlines()]


def error(answer: dict[str, Any]) -> str:
    assert "\n" not in answer["error"]
    return str(answer["error"])


@pytest.fixture(scope="module")
def asked(
    make_model_directory: Callable[[str], Path],
    forking: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """All answers, by case; the model's fingerprint; the hub's address."""
    directory = make_model_directory("gpt2")
    root, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    for name in ("good", "interrupted", "cut", "members", "reviewed"):
        folder = root / "models" / "someone" / name
        shutil.copytree(directory, folder)
        # Bytes of their own: the client keeps files of equal content once for all models.
        weights = load_file(directory / "model.safetensors")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "of": name})
    cases = {
        "found": ("load", "someone/good", None),
        "outline": ("outline", "someone/members", "main"),
        "members": ("load", "someone/members", None),
        "reviewed": ("load", "someone/reviewed", None),
        "missing": ("load", "someone/nothing", None),
        "revision": ("load", "someone/good", "v9"),
        "tokenizer": ("tokenizer", "someone/good", None),
        "interrupted": ("load", "someone/interrupted", None),
        "cut": ("load", "someone/cut", None),
    }
    with ExitStack() as stack:
        with hub_module().serving(root) as hub:
            hub.gated = {"someone/members": 401, "someone/reviewed": 403}
            hub.cuts["someone/interrupted", "model.safetensors"] = 1
            hub.cuts["someone/cut", "model.safetensors"] = 1_000
            environment = {**hub.environment(home), "PYTHONWARNINGS": "error"}
            modules = ("mlsae.models.loading", "transformers.models.gpt2.modeling_gpt2")
            processes = stack.enter_context(forking.importing(*modules, environment=environment))
            answers = dict(zip(cases, ask(processes, *cases.values()), strict=True))
            answers["url"] = hub.url
        answers["cached"], answers["unreachable"] = ask(
            processes, cases["found"], ("load", "someone/never-asked-for", None)
        )
    answers["fingerprint"] = load(directory).fingerprint()
    return answers


def test_a_model_of_the_hub_is_the_model(asked: dict[str, Any]) -> None:
    found = asked["found"]
    assert found["fingerprint"] == asked["fingerprint"]
    assert found["name"] == "someone/good"
    assert len(found["revision"]) == 40


@pytest.mark.parametrize("case", ["members", "reviewed", "outline"])
def test_gated(asked: dict[str, Any], case: str) -> None:
    name = "someone/reviewed" if case == "reviewed" else "someone/members"
    assert error(asked[case]) == (
        f"model {name} is gated on {asked['url']}: ask for access on its page, then log in "
        "with `hf auth login`"
    )


def test_missing(asked: dict[str, Any]) -> None:
    assert error(asked["missing"]) == (
        "there is no model 'someone/nothing': no such directory here and no such model on "
        f"{asked['url']}; check the spelling, or log in with `hf auth login` if it is private"
    )


def test_missing_revision(asked: dict[str, Any]) -> None:
    assert error(asked["revision"]) == (
        f"model someone/good has no revision 'v9' on {asked['url']}"
    )


def test_a_model_without_a_tokenizer(asked: dict[str, Any]) -> None:
    assert error(asked["tokenizer"]).startswith("someone/good holds no tokenizer: expected")


def test_a_connection_cut_once_is_taken_up_again(asked: dict[str, Any]) -> None:
    assert asked["interrupted"]["fingerprint"] == asked["fingerprint"]


def test_a_connection_that_is_always_cut(asked: dict[str, Any]) -> None:
    text = error(asked["cut"])
    assert text.startswith(
        f"the connection to {asked['url']} broke off while model someone/cut was fetched (peer "
        "closed connection without sending complete message body"
    )
    assert text.endswith("run the same command again: what has arrived is kept")


def test_without_the_hub_its_cache_serves(asked: dict[str, Any]) -> None:
    for key in ("fingerprint", "name", "revision"):
        assert asked["cached"][key] == asked["found"][key]


def test_without_the_hub_an_unknown_model_is_refused_at_once(asked: dict[str, Any]) -> None:
    """The hub's own library asks a dead address for 23 seconds before it gives up."""
    text = error(asked["unreachable"])
    assert text.startswith("cannot find model 'someone/never-asked-for': no such directory here")
    assert f"and {asked['url']} cannot be reached; give a local directory, or run `hf " in text
    assert asked["unreachable"]["seconds"] < 10


def test_behind_a_proxy_the_hub_is_taken_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    is_reachable.cache_clear()
    assert not is_reachable("http://127.0.0.1:9")
    is_reachable.cache_clear()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert is_reachable("http://127.0.0.1:9")
    is_reachable.cache_clear()
