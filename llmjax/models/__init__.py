"""Model families: published shapes as configs of `llmjax.nn.decoder`, and their weights to and from safetensors."""
