"""The life of a job, as pure code: events in, state and commands out."""
