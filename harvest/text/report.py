"""Lines about the packed text: its amount, its sources, the parts that were left out."""

from collections.abc import Iterator

from mlsae.base.units import format_count
from mlsae.harvest.text.packing import PackedText


def text_lines(packed: PackedText) -> Iterator[str]:
    """Lines in the order to be printed."""
    num_tokens = len(packed.tokens)
    yield (
        f"packed {format_count(num_tokens)} tokens: "
        f"{format_count(num_tokens // packed.context_length)} sequences of "
        f"{packed.context_length} from {format_count(packed.num_documents)} documents"
    )
    if len(packed.taken) > 1:
        total = sum(taken.num_tokens for taken in packed.taken)
        for taken in packed.taken:
            ended = "; it ran out, and the text ended there" if taken.ran_out else ""
            yield (
                f"{taken.name}: {format_count(taken.num_tokens)} tokens, "
                f"{taken.num_tokens / total:.2%} (asked: {taken.share:.2%}), from "
                f"{format_count(taken.num_documents)} documents{ended}"
            )
    if packed.num_padding:
        share = packed.num_padding / num_tokens
        yield f"padding: {format_count(packed.num_padding)} tokens, {share:.1%} of all"
    if packed.num_cut:
        yield (
            f"cut off: {format_count(packed.num_cut)} tokens of "
            f"{format_count(packed.num_cut_documents)} documents longer than a sequence"
        )
    if packed.num_left_over:
        yield (
            f"left out: the final incomplete sequence, {format_count(packed.num_left_over)} tokens"
        )
    if packed.num_empty:
        yield f"passed over: {format_count(packed.num_empty)} empty documents"
