"""From prompts to tensors: token ids, label masks, batches, and the loss on target tokens."""
