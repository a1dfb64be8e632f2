"""Plan a run before it starts: memory, time and communication per GPU. Imports no torch."""
