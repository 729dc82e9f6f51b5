"""For those who run jobs: the state of runs, backups of their secrets, and checks of a machine."""
