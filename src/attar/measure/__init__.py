"""Measure what a model takes on this machine, in the engines that run it."""
