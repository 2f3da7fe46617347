"""The built-in recurrent networks: cells, loops over time, and linearisation."""
