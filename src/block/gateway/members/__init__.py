"""Who is there: membership, health, the predictors' streams, and where instances are discovered."""
