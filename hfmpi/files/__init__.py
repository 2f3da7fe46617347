"""All files on disk: each is written completely or not at all, and none is trusted when it is read."""
