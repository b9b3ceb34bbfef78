"""Many trainings as one piece of work: sweeps, cooking, reports, tracking."""
