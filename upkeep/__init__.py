"""A run's upkeep: what keeps it safe, and what it stands on. A reader of the loop meets it by names
that say enough, and need not open it; each file says at its top what its one subject is."""
