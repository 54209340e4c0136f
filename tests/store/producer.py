"""A producer of activations to be killed: argv = store directory, seed of the values."""

import sys

import numpy as np

from mlsae.store import create


def main() -> None:
    """Write 40 shards, one line to stdout for each batch."""
    path, seed = sys.argv[1], int(sys.argv[2])
    num_sequences, context_length, d_model = 80, 64, 256
    tokens = np.arange(num_sequences * context_length) % 1000
    with create(
        path,
        tokens=tokens,
        context_length=context_length,
        layers=(0, 1),
        d_model=d_model,
        batch_sequences=1,
        shard_bytes=2 * context_length * d_model * 2,
    ) as writer:
        while writer.position is not None:
            generator = np.random.default_rng([seed, writer.position])
            batch = generator.normal(size=(2, context_length, d_model)).astype(np.float32)
            writer.append({("resid_post", 0): batch[0], ("resid_post", 1): batch[1]})
            print("batch", flush=True)


if __name__ == "__main__":
    main()
