"""OpenAI's interface over ordinary jobs: what comes in and goes out has its form, nothing else."""
