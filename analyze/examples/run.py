"""The part of an analysis that is its examples: planned, collected, written and told."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlsae.analyze.config import AnalyzeConfig
from mlsae.analyze.examples.collect import Examples, ExamplesPlan
from mlsae.analyze.examples.sample import RANGES
from mlsae.analyze.examples.table import write_examples
from mlsae.analyze.pairing import Pairing
from mlsae.analyze.results.directory import EXAMPLES_FILE
from mlsae.analyze.results.tables import schema
from mlsae.analyze.transformer import NoTextError, Pieces
from mlsae.base.errors import ResourceError
from mlsae.base.machine.resources import require_disk, require_memory
from mlsae.base.output.console import Progress
from mlsae.base.units import counted, format_bytes

_REMEDY = "lower --examples, --samples or --context-tokens"


def plan_examples(
    pairing: Pairing, num_rows: int, config: AnalyzeConfig, directory: Path
) -> ExamplesPlan | None:
    """Plan the examples, once it is known that there is room for them; None for no examples.

    Args:
        pairing: store and SAE.
        num_rows: rows of each layer.
        config: the settings.
        directory: where the table will be.

    Raises:
        ResourceError: there is too little memory or disk.
    """
    if config.examples == 0:
        return None
    before, after = config.context_tokens
    plan = ExamplesPlan(
        top=config.examples,
        samples=config.samples,
        before=before,
        after=after,
        seed=config.examples_seed,
    )
    num_latents, num_layers = pairing.sae.config.num_latents, len(pairing.layers)
    what = f"the examples of {counted(num_latents, 'latent')} at {counted(num_layers, 'layer')}"
    num_bytes = plan.num_bytes(num_latents, num_layers)
    if pairing.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(pairing.device)
        if num_bytes > free:
            raise ResourceError(
                f"not enough memory of {pairing.device} for {what}: needs "
                f"{format_bytes(num_bytes)}, {format_bytes(free)} available; {_REMEDY}"
            )
    else:
        require_memory(num_bytes, what, _REMEDY)
    most = plan.most_examples(num_latents, num_layers)
    num_events = num_rows * num_layers * pairing.sae.expected_active
    # An event is one of the strongest of all, of its layer, and a sample, at most.
    num_examples = min(most, 3 * num_events)
    require_disk(directory, num_examples * plan.disk_bytes(num_layers), what, _REMEDY)
    return plan


def write_table(
    directory: Path,
    examples: Examples | None,
    text: tuple[Pieces | None, str | None],
    provenance: Mapping[str, str],
) -> dict[str, Any] | None:
    """Write the table and return its description; None for no examples.

    Args:
        directory: directory of the analysis.
        examples: all of them.
        text: function that gives tokens their text, or the reason why there is none.
        provenance: provenance of the table.
    """
    if examples is None:
        return None
    pieces, reason = text
    path, columns = directory / EXAMPLES_FILE, schema("examples", provenance)
    try:
        with Progress("examples", examples.num_latents, "latent") as bar:
            num_examples = write_examples(path, columns, examples, pieces, bar.update)
    except NoTextError as error:
        reason = str(error)
        num_examples = write_examples(path, columns, examples, None, lambda _: None)
    plan = examples.plan
    return {
        "top": plan.top,
        "ranges": RANGES,
        "samples": plan.samples,
        "context_tokens": [plan.before, plan.after],
        "seed": plan.seed,
        "num_examples": num_examples,
        "no_text_because": reason,
    }
