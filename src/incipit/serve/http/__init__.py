"""The server's HTTP side: OpenAI's shapes over any engine and prompt store of `incipit.serve.asks`."""
