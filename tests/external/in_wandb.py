"""Print, as JSON, the history of an offline run: one mapping a line of the log.

The file is a log in blocks as LevelDB has them, of Weights & Biases' own records.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK, HEAD, FILE_HEAD = 32768, 7, 7
FULL, LAST = 1, 4


def records(data: bytes) -> Iterator[bytes]:
    """Records, put together where they run over several pieces."""
    at, pieces = FILE_HEAD, b""
    while at + HEAD <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEAD:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pieces += data[at + HEAD : at + HEAD + size]
        at += HEAD + size
        if kind in (FULL, LAST):
            yield pieces
            pieces = b""


lines = []
for found in records(Path(sys.argv[1]).read_bytes()):
    record = wandb_internal_pb2.Record()
    record.ParseFromString(found)
    if record.WhichOneof("record_type") == "history":
        items = record.history.item
        lines.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
print(json.dumps(lines))
