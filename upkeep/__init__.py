"""A run's upkeep, which the method does without: a reader of the loop need not open it.

errors.py       what the user can mend, told in one line
files.py        files whole or not at all; folders that one process and one configuration hold
tensors.py      safetensors files and the names in them
checkpoints.py  where a stage of training stands: saved, and restored
log.py          the metrics of a stage, a line a step; requests to stop
optim.py        the optimiser's step and schedule
processes.py    those that torchrun starts
machine.py      the device, and the memory used
flags.py        a command line from the fields of a dataclass
"""
