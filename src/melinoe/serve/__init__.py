"""Serve a model over HTTP to OpenAI's clients, many requests at once over one expert cache."""
