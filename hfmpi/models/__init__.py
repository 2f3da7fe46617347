"""The interface between models and the rest of hfmpi: protocols, losses, linearisation and batch."""
