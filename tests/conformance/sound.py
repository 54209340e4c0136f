"""Make the sound stores again, by mlsae: python tests/conformance/sound.py [DIRECTORY]

They go to `valid/` in the directory, beside this file if none is given. Everything is a pure
function of this file, but for the bytes that zstd makes, which depend on its version.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from resealed import COMPLETE, LENGTH, PLAN, SETUP, WIDTH, Files, sha256

from mlsae.base.files import seal, write_durably
from mlsae.store import MASKED, PADDING, SPECIAL, Calibrator, create

SEQUENCES = 5


def make_valid(path: Path, **options: Any) -> None:
    """A small store: two shards, the second short; one outlier; flags of every kind."""
    settings: dict[str, Any] = {"layers": (0, 2), "sites": ("resid_post",), "d_model": WIDTH}
    settings |= {"encoding": "float32", "shard_bytes": 4 * LENGTH * WIDTH * 3, **options}
    generator = np.random.default_rng(7)
    num_tokens, width = LENGTH * SEQUENCES, settings["d_model"]
    flags = np.zeros(num_tokens, np.uint8)
    flags[[2, 9, 17]] = [SPECIAL, PADDING, MASKED]
    keys = [(site, layer) for site in settings["sites"] for layer in settings["layers"]]
    values = {}
    for number, key in enumerate(keys):
        x = generator.normal(size=(num_tokens, width)) * (number + 1) + np.arange(width)
        x[0] *= 50
        # Exact in every float encoding, so that no reader needs to round.
        values[key] = (np.rint(x * 8) / 8).astype(np.float32)
    if settings["encoding"] == "int8":
        calibrator = Calibrator(keys, width)
        calibrator.add(
            {
                key: x[(flags == 0) & (np.arange(num_tokens) % LENGTH > 0)]
                for key, x in values.items()
            }
        )
        settings["calibration"] = calibrator.result()
        settings["max_added_fvu"] = 1.0
    with create(
        path,
        tokens=np.arange(num_tokens) * 7 % 23,
        context_length=LENGTH,
        documents=np.arange(num_tokens) // 4,
        token_flags=flags,
        source={"made_by": "the conformance stores"},
        producer={"device": "none"},
        **settings,
    ) as writer:
        tokens = writer.row_tokens(0, writer.num_rows)
        while writer.position is not None:
            rows = slice(writer.position, min(writer.position + LENGTH, writer.num_rows))
            writer.append({key: x[tokens[rows]] for key, x in values.items()})
    (path / "README.md").unlink(missing_ok=True)


def valid_stores(root: Path) -> None:
    """Every encoding and every choice that a plan can make."""
    make_valid(root / "float32")
    make_valid(root / "float16", encoding="float16")
    make_valid(root / "bfloat16", encoding="bfloat16")
    make_valid(root / "int8", encoding="int8", d_model=70)
    make_valid(root / "float16-zstd", encoding="float16", compression="zstd")
    make_valid(root / "int8-zstd", encoding="int8", compression="zstd", d_model=64)
    make_valid(root / "keep-positions", keep_positions=4, keep_seed=3)
    make_valid(root / "several-sites", sites=("attn_out", "resid_pre"), layers=(1,))
    make_valid(root / "batches-of-two", batch_sequences=2, shard_bytes=600)
    make_valid(root / "derived", derived_from={"store_id": "ab" * 32, "sequences": [0, 5]})
    make_valid(root / "with-company")
    company = root / "with-company"
    write_durably(company / "provenance/run.json", seal({"started": "2024-05-01"}))
    text = b"---\ntags: [mlsae-card]\n---\n# Activations\n"
    last = f"<!-- mlsae-card sha256={sha256(text)} -->\n".encode()
    (company / "README.md").write_bytes(text + last)
    (company / ".gitattributes").write_text("* -text\n")
    files = Files.read(root / "float32")
    later = {"must_understand": False, "note": "of a later minor version"}
    files.edit(PLAN, lambda plan: plan.update(schema_version="1.9", hint=later))
    for name in (SETUP, COMPLETE, *files.commits()):
        files.edit(name, lambda record: record.update(hint=later))
    files.reseal()
    files.write(root / "later-minor")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    shutil.rmtree(target / "valid", ignore_errors=True)
    valid_stores(target / "valid")
