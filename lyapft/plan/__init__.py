"""What a study will run and what it will cost, before anything runs: `python -m lyapft.plan study=…`."""
