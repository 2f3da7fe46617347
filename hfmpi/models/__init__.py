"""Pure mathematics on one device: recurrent networks, their linearisation and its transpose."""
