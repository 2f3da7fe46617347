"""All files on disk: each file is written completely or not at all, and is validated when it is read."""
