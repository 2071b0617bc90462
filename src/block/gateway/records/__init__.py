"""What is kept and told: metrics, decisions, recent requests, the request log, traces."""
