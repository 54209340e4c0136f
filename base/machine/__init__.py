"""The processor, the heap and the scheduler of the machine that runs this process."""
