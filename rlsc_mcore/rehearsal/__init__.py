"""Rehearsal of training steps with fake CUDA tensors: shapes, memory, copies and collectives without a GPU or
weights."""
