"""HTTP router: pairs each request with a prefill and a decode server and relays the answer, without changing bodies."""
