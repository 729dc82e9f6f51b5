"""Text to tokens to fixed blocks to Arrow shards, once; and their order at training time."""
