"""Print, as JSON, the scalars of a TensorBoard directory: step → name → value."""

import json
import sys
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events: Any = EventAccumulator(sys.argv[1])
events.Reload()
found: dict[int, dict[str, float]] = {}
for name in events.Tags()["scalars"]:
    for event in events.Scalars(name):
        found.setdefault(event.step, {})[name] = event.value
print(json.dumps(found))
