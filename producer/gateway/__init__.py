"""The OpenAI-compatible HTTP gateway. Stateless: any number may run, a stream begun on one goes on on another."""
