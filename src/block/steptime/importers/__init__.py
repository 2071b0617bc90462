"""Profiles from what others measured: kernel tables of one layer, made into the step times of a whole engine."""
