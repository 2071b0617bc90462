"""Bytes: HTTP/1.1 on both sides, TLS, what of OpenAI's API is read, answers relayed and continued."""
