"""What turns a run into the events of measurements: one driver for Lightning's Trainer, one for a plain loop."""
