"""A page shows all latents where they are few, and of many those that tell most."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from mlsae.analyze.results.page.latents import MAX_CELLS, MAX_LATENTS, choose

Tables = Callable[[int, int], tuple[pa.Table, pa.Table]]
"""(num_latents, num_layers) → `latents` and `latent_layers`."""


def test_few_latents_are_all_shown_and_of_many_a_choice(random_tables: Tables) -> None:
    latents, _ = random_tables(MAX_LATENTS, 6)
    chosen, rule = choose(latents, 6)
    assert chosen.tolist() == list(range(MAX_LATENTS))
    assert rule == f"All {MAX_LATENTS:,} latents."
    latents, _ = random_tables(131_072, 6)
    chosen, rule = choose(latents, 6)
    assert len(chosen) == len(set(chosen.tolist())) == MAX_LATENTS
    assert rule.startswith("4,096 of 131,072 latents: the most frequent, and of those at least as ")
    count, spread = latents["count"].to_numpy(), latents["layer_std"].to_numpy()
    often = np.flatnonzero(count >= np.median(count[count > 0]))
    by_spread = often[np.argsort(spread[often])]
    third = MAX_LATENTS // 3
    expected = {*by_spread[:third].tolist(), *by_spread[-third:].tolist()}
    for latent in np.argsort(-count, kind="stable").tolist():
        if len(expected) < MAX_LATENTS:
            expected.add(latent)
    assert set(chosen.tolist()) == expected
    assert len(choose(latents, 96)[0]) == MAX_CELLS // 96


def test_a_choice_among_dead_latents(random_tables: Tables) -> None:
    latents, _ = random_tables(MAX_LATENTS + 1, 2)
    at = latents.schema.get_field_index("count")
    latents = latents.set_column(at, "count", pa.array([0] * (MAX_LATENTS + 1)))
    assert choose(latents, 2)[0].tolist() == list(range(MAX_LATENTS))
