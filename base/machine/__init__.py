"""The machine that runs this process: processor, heap, scheduler, free memory and disk."""
