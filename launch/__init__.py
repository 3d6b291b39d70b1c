"""How processes start: the command line `trivium`, the launcher configurations, the set-up of the environment."""
