"""Any detection data set to verified shards, and shards to batches.

`formats` reads and checks annotations, `shard` writes WebDataset tars, `manifest` describes and
verifies them, `stream` and `augment` turn them into batches. This room imports no other room.
"""
