"""Study runs of one job on several numbers of ranks: measured and predicted speedup."""
