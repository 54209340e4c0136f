"""An open store in other processes: pickled to them, or taken along by a fork."""

import pickle
import subprocess
import sys

import numpy as np
import pytest

from mlsae.store import RemoteError, open_corpus, open_store
from mlsae.store.places.objects import LocalObjects
from mlsae.store.places.relay import Relay

CHILD = """
import multiprocessing, sys
import numpy as np
from mlsae.store import open_store

url = sys.argv[1]
store = open_store(url, cache_bytes=0)
expected = store.read("resid_post", 1, 0, 40)

def work(answers):
    try:
        inherited = store.read("resid_post", 1, 0, 40)
        opened = open_store(url, cache_bytes=0)
        objects = opened.objects
        assert not objects.exists("no such object")
        assert objects.read("plan.json", 2**20) == store.objects.read("plan.json", 2**20)
        try:
            objects.size("no such object")
        except FileNotFoundError as error:
            missing = error.filename
        answers.put([
            bool((inherited == expected).all()),
            bool((opened.read("resid_post", 1, 0, 40) == expected).all()),
            missing == f"{objects.place}/no such object",
        ])
    except BaseException as error:
        answers.put(repr(error))

context = multiprocessing.get_context("fork")
answers = context.Queue()
child = context.Process(target=work, args=(answers,), daemon=True)
child.start()
print(answers.get(timeout=60))
"""


def test_a_remote_store_is_read_in_a_forked_process(sample, serve):
    """The library that asks servers does not survive a fork; a process beside does it."""
    command = [sys.executable, "-c", CHILD, serve("web", sample.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "[True, True, True]\n", done.stderr


@pytest.mark.parametrize("kind", ["local", "web", "hub"])
def test_a_pickled_store_is_opened_anew(sample, serve, tmp_path, kind):
    location = sample.path if kind == "local" else serve(kind, sample.path)
    store = open_store(location, cache_dir=str(tmp_path / "cache"), cache_bytes=2**20)
    again = pickle.loads(pickle.dumps(store))
    assert (again.store_id, again.place) == (store.store_id, store.place)
    np.testing.assert_array_equal(again.read("resid_post", 3), store.read("resid_post", 3))


def test_a_pickled_corpus_is_opened_anew(sample_maker):
    places = [sample_maker(name, seed=seed).path for seed, name in enumerate("ab")]
    corpus = open_corpus(places)
    again = pickle.loads(pickle.dumps(corpus))
    assert again.store_id == corpus.store_id
    np.testing.assert_array_equal(again.read("resid_post", 3), corpus.read("resid_post", 3))


def test_a_relay_that_has_ended_is_one_line(sample):
    relay = Relay(LocalObjects(sample.path))
    assert relay.call("exists", "plan.json")
    with pytest.raises(FileNotFoundError):
        relay.call("size", "no such object")
    relay._process.kill()
    relay._process.wait()
    with pytest.raises(RemoteError, match="the process that reads in place of this forked one has"):
        relay.call("exists", "plan.json")
