"""The seam between a model and the rest of hfmpi: protocols, losses, one linearisation, one batch."""
