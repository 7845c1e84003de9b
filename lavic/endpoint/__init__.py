"""Client of OpenAI-compatible servers: chat completions and embeddings, bounded, retried and cached."""
