"""What is converted: a checkpoint's configuration, weights and tokenizer, one description per architecture."""
