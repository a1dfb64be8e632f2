"""Rehearse training steps with fake CUDA tensors: record memory, copies and collectives without GPU or
weights."""
