"""Files and processes: atomic writing, locks, signals, parts of a long job, ranks, image folders, plots, progress."""
