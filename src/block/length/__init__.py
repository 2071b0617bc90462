"""How long will the answer be? Estimators of output lengths, each a distribution; by name in `table`."""
