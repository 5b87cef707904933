"""The callbacks' records on disk: what they hold, how they are written, and the reader. Neither torch nor Lightning."""
