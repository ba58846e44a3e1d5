"""Loops that read like the data flow. None is subclassed: an algorithm differs by its row in `burnish.algorithms`."""
