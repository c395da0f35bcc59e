"""The HTTP server: OpenAI-compatible API, tokenizer, and the router that keeps every stream alive. No torch."""
