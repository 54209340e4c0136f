"""docs/evidence/intervals.md from the JSON of `benchmarks.intervals`."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.markdown import made, paragraph, table

Coverage = Mapping[str, Sequence[Mapping[str, float]]]
"""Population or metric → its samples, by size."""


def intervals_page(content: dict[str, Any]) -> str:
    """Markdown."""
    planted, real = content["coverage"]["planted"], content["coverage"]["real"]
    sizes = [int(at["sequences"]) for at in next(iter(planted.values()))]
    about = paragraph(
        f"From {sizes[0]} to {sizes[-1]} sequences, 95% intervals of `mlsae analyze` are the outer "
        "ends of Student's interval about the jackknife and of Hall's, which follows the skewness, "
        "taken three times ([metrics](../metrics.md#intervals)). Coverage is the share of samples "
        "whose interval holds the value of the population that they are drawn from, with "
        "replacement: "
        f"{content['samples']:,} samples of each size, so that a coverage of 0.95 is known to "
        f"within {1.96 * (0.95 * 0.05 / content['samples']) ** 0.5:.3f}. In brackets: percentiles "
        "of 1,000 bootstrap resamples of the same samples."
    )
    settings = content["settings"]
    of_real = paragraph(
        f"The population is {content['sequences']:,} held-out sequences of "
        f"{content['context_length']} tokens of TinyStories, read by stories260k, with an SAE on "
        f"all its layers (expansion factor {settings['expansion_factor']}, k {settings['k']}, "
        f"{settings['max_rows']:,} rows)."
    )
    command = content["command"].replace(" --", " \\\n    --")
    return f"""# Intervals from few sequences

<!-- Made by `make results` from intervals.json; edit benchmarks/intervals_page.py instead. -->

{about}

{_sentence({**planted, **real})}

## Real sequences

{of_real}

{_table("metric", real, sizes)}

## Planted populations

Sequences of 64 to 256 tokens, each with a value a token of its own, spread as the name says; some
are more skewed than most metrics above. `denominator log-normal` is a ratio whose denominator a
few sequences own, `noise in both` a share of a difference that varies itself.

{_table("population", planted, sizes)}

## How it was made

<!-- not run: needs the stories260k model and the TinyStories text, and minutes -->
```sh
{command}
```

{made(content)}
"""


def _sentence(every: Coverage) -> str:
    ours = [at["coverage"] for of in every.values() for at in of]
    theirs = [at["percentile_coverage"] for of in every.values() for at in of]
    widths = [at["width_ratio"] for of in every.values() for at in of]
    return paragraph(
        f"Over all populations, metrics and sizes coverage is {min(ours):.3f} to {max(ours):.3f}; "
        f"of percentiles it is {min(theirs):.3f} to {max(theirs):.3f}. The intervals are "
        f"{min(widths):.2f} to {max(widths):.2f} times as wide, most where sequences are few and "
        "skewed."
    )


def _table(name: str, every: Coverage, sizes: Sequence[int]) -> str:
    rows = [
        [
            label,
            *(f"{at['coverage']:.3f} ({at['percentile_coverage']:.3f})" for at in of),
        ]
        for label, of in every.items()
    ]
    return table([name, *(f"{size} sequences" for size in sizes)], rows)
