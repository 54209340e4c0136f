"""Documents' tokens to whole sequences on disk: T = context_length tokens each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlsae.harvest.text.joints import Joints
from mlsae.harvest.text.spool import Spool
from mlsae.store import MASKED, PADDING, SPECIAL

Tokens = npt.NDArray[np.uint32]
TOKENS_IN_MEMORY = 1 << 18


class SequenceBuilder:
    """Fills sequences document by document; full ones go to the spool."""

    def __init__(
        self,
        joints: Joints,
        *,
        context_length: int,
        max_sequences: int | None,
        special_ids: Sequence[int],
        near: Path,
    ) -> None:
        """Begin with no sequence.

        Args:
            joints: tokens before, between and behind documents.
            context_length: tokens of a sequence.
            max_sequences: most sequences; None for no limit.
            special_ids: tokens to be flagged SPECIAL.
            near: directory on the disk to use for full sequences.
        """
        self._joints = joints
        self._length = context_length
        self._max_sequences = max_sequences
        self._special = np.asarray(special_ids, np.uint32)
        size = max(TOKENS_IN_MEMORY // context_length, 1) * context_length
        self._tokens = np.empty(size, np.uint32)
        self._documents = np.empty(size, np.uint32)
        self._is_padding = np.zeros(size, bool)
        self._is_sink = np.zeros(size, bool)
        self._end = 0
        self._num_flushed = 0
        self._num_opening = 0
        self._has_text = False
        self._spools = (Spool(near, np.uint32), Spool(near, np.uint32), Spool(near, np.uint8))
        self.num_documents = 0
        """Documents added so far, empty ones included."""
        self.num_cut = 0
        """Tokens of documents that were longer than their sequence."""
        self.num_cut_documents = 0
        """Documents that were cut."""
        self.num_padding = 0
        """Tokens that only fill sequences up."""

    @property
    def num_sequences(self) -> int:
        """Whole sequences so far."""
        return (self._num_flushed + self._end) // self._length

    @property
    def is_full(self) -> bool:
        """True once there are `max_sequences`."""
        return self.num_sequences == self._max_sequences

    @property
    def num_in_last(self) -> int:
        """Tokens of the incomplete last sequence, without the one that opens it."""
        in_row = self._end % self._length
        return in_row - self._num_opening if in_row else 0

    def add(self, ids: Tokens) -> int:
        """Add the next document, with its separators; an empty one only counts.

        Args:
            ids: (n,) tokens of the document.

        Returns:
            Tokens that went into sequences, separators included; openings and padding are not.
        """
        document = self.num_documents
        self.num_documents += 1
        if not len(ids):
            return 0
        joints = self._joints
        begins = joints.bos is None or not self._has_text or ids[0] == joints.bos
        before = [] if begins else [joints.bos]
        after = [] if joints.eos is None or ids[-1] == joints.eos else [joints.eos]
        self._has_text = True
        if before or after:
            ids = np.concatenate([np.asarray(before, np.uint32), ids, np.asarray(after, np.uint32)])
        if joints.packing == "document":
            return self._add_alone(ids, document)
        if joints.isolate_documents and self._end % self._length:
            # The first token of a context takes up attention that has nowhere else to go, as
            # position 0 of a sequence does; here no position tells it from others.
            self._is_sink[self._end] = not joints.opening
            self._open(document, ids)
        return self._add_joined(ids, document)

    def finish(self) -> tuple[Tokens, Tokens, npt.NDArray[np.uint8]]:
        """Tokens, documents and flags of all whole sequences, as maps of (num_tokens,)."""
        self._flush()
        tokens, documents, flags = (spool.finish() for spool in self._spools)
        return tokens, documents, flags

    def close(self) -> None:
        """Give up the files; maps of them stay valid."""
        for spool in self._spools:
            spool.close()

    def _add_joined(self, ids: Tokens, document: int) -> int:
        taken = 0
        while taken < len(ids) and not self.is_full:
            if self._end % self._length == 0:
                self._open(document, ids[taken:])
            room = self._length - self._end % self._length
            taken += self._put(ids[taken : taken + room], document)
        return taken

    def _add_alone(self, ids: Tokens, document: int) -> int:
        self._open(document, ids)
        room = self._length - self._end % self._length
        taken = self._put(ids[:room], document)
        if taken < len(ids):
            self.num_cut += len(ids) - taken
            self.num_cut_documents += 1
        if missing := room - taken:
            self._is_padding[self._end : self._end + missing] = True
            self._put(np.full(missing, self._joints.padding, np.uint32), document)
            self.num_padding += missing
        return taken

    def _open(self, document: int, ids: Tokens) -> None:
        """Open a context for tokens that do not begin with its opening themselves."""
        position, opening = self._end % self._length, self._joints.opening
        if not position:
            self._num_opening = 0
        if opening and tuple(ids[: len(opening)].tolist()) != opening:
            # In the last places of a sequence not all of it has room.
            tokens = np.asarray(opening[: self._length - position], np.uint32)
            self._put(tokens, document)
            if not position:
                self._num_opening = len(tokens)

    def _put(self, ids: Tokens, document: int) -> int:
        """Write tokens that fit into the sequence in hand."""
        if self._end == len(self._tokens):
            self._flush()
        stop = self._end + len(ids)
        self._tokens[self._end : stop] = ids
        self._documents[self._end : stop] = document
        self._end = stop
        return len(ids)

    def _flush(self) -> None:
        whole = self._end - self._end % self._length
        padding = self._is_padding[:whole]
        flags = np.where(np.isin(self._tokens[:whole], self._special), SPECIAL, 0)
        flags[self._is_sink[:whole]] |= MASKED
        flags[padding] = PADDING
        for spool, values in zip(
            self._spools, (self._tokens[:whole], self._documents[:whole], flags), strict=True
        ):
            spool.append(values)
        padding[:] = False
        self._is_sink[:whole] = False
        self._num_flushed += whole
        self._end = 0
