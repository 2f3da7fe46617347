"""The study of runs of one job on several numbers of ranks: what more brought, and what was predicted."""
