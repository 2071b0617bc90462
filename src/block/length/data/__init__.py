"""Records to learn from, in whatever form they come."""
