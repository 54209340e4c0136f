"""`python -m mlsae`, which is also how torchrun and accelerate start several processes."""

from mlsae.cli import main

main()
