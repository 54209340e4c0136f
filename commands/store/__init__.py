"""Commands below `mlsae store`, a file each."""

import click

from mlsae.commands.options import CommandList
from mlsae.commands.store.copy import copy
from mlsae.commands.store.info import info
from mlsae.commands.store.rm import rm
from mlsae.commands.store.verify import verify


@click.group(cls=CommandList)
def store() -> None:
    """Look at an activation store, check every byte, copy it or remove it."""


for command in (info, verify, copy, rm):
    store.add_command(command)
