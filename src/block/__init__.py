"""Block: a predictive load balancer for large-language-model serving."""

__version__ = "0.1.0"
