"""The built-in recurrent networks: cells, the loops over time, and their linearisation."""
