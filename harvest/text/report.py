"""Lines about the packed text: its amount, its sources, the parts that were left out."""

from collections.abc import Iterator

from mlsae.base.units import counted
from mlsae.harvest.text.packing import PackedText


def text_lines(packed: PackedText) -> Iterator[str]:
    """Lines in the order to be printed."""
    num_tokens = len(packed.tokens)
    yield from (taken.note for taken in packed.taken if taken.note is not None)
    yield (
        f"packed {counted(num_tokens, 'token')}: "
        f"{counted(num_tokens // packed.context_length, 'sequence')} of "
        f"{packed.context_length} from {counted(packed.num_documents, 'document')}"
    )
    if packed.joints.packing == "rows":
        yield f"rows of token ids are sequences of {packed.context_length} already and stay whole"
    elif packed.row_length not in (None, 0, 1, packed.context_length):
        yield (
            f"note: the first rows of token ids all hold {packed.row_length:,} tokens; if they "
            f"are sequences already, give --context-length {packed.row_length}"
        )
    if len(packed.taken) > 1:
        total = sum(taken.num_tokens for taken in packed.taken)
        for taken in packed.taken:
            ended = "; it ran out, and the text ended there" if taken.ran_out else ""
            yield (
                f"{taken.name}: {counted(taken.num_tokens, 'token')}, "
                f"{taken.num_tokens / total:.2%} (asked: {taken.share:.2%}), from "
                f"{counted(taken.num_documents, 'document')}{ended}"
            )
    if packed.num_padding:
        share = packed.num_padding / num_tokens
        yield f"padding: {counted(packed.num_padding, 'token')}, {share:.1%} of all"
    if packed.num_cut:
        yield (
            f"cut off: {counted(packed.num_cut, 'token')} of "
            f"{counted(packed.num_cut_documents, 'document')} longer than a sequence"
        )
    if packed.num_left_over:
        left_over = counted(packed.num_left_over, "token")
        yield f"left out: the final incomplete sequence, {left_over}"
    if packed.num_empty:
        yield f"passed over: {counted(packed.num_empty, 'empty document')}"
