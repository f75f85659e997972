"""HTTP in, jobs out. No torch."""
