"""Rewards by rule: what can be counted, read or measured in a picture, a file each."""
