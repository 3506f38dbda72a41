"""One command for a whole deployment on one host: start, watch and stop prefill, decode and router."""
