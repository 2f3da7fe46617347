"""What a run costs: the paper's counts and the clock."""
