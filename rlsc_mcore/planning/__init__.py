"""What a run will need, before it is started: memory, time and communication per GPU; imports no torch."""
