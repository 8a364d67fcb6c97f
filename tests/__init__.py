"""A package of its own: torch-fidelity installs another `tests`, which would win over a folder without this file."""
