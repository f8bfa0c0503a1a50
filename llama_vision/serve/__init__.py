"""A server that speaks OpenAI's chat completions: one engine, many clients."""
