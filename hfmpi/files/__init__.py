"""Everything that lies on a disk: written whole or not at all, and read as if it came from a stranger."""
