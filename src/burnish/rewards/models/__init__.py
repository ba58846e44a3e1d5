"""Reward models: networks that read the published checkpoints through transformers' classes, a file each."""
