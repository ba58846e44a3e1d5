"""Small worlds in which every method can be run, and judged against the truth, without a GPU."""
